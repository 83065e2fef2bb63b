"""The worker process, one per device: executes commands in FIFO order and answers each with one event.

The engine's side: `spec` what a worker is told at its start · `launcher` how it is started · `process` and `forked` the
handle on one worker process, `reproducible` what its environment must say. Only these may be imported by the engine:
the others import torch.

The worker's: `fork_server` what CPU workers are forked from · `entry` the command loop · `answers` a command's event.
`runner` what each command does on a CPU. On a GPU: `device_runner` what each command does, `device_model` the loaded
model, `step_graphs` its recorded steps, `work_queue` streams, events and graphs, `completions` the thread that answers.
"""
