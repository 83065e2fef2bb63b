"""The worker process, one per device: executes commands in FIFO order and answers each with one event.

`spec` what a worker is told at its start: only this may be imported by the engine, the others import torch. How it is
started is in `executors/fleet/`.

`fork_server` what CPU workers are forked from · `entry` the command loop · `answers` a command's event · `cpu` what
each command does on a CPU. On a GPU: `gpu/runner` what each command does, `gpu/model` the loaded model, `gpu/graphs`
its recorded steps, `gpu/queue` streams, events and graphs, `completions` the thread that answers.
"""
