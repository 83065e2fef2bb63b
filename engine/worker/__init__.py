"""The worker process, one per device: executes commands in FIFO order and answers each with one event.

`spec` what a worker is told at its start · `__main__` entry and command loop · `process` the engine's handle on a
worker process · `answers` a command's event. `runner` what each command does on a CPU. On a GPU: `device_runner` what
each command does, `device_model` the loaded model, `step_graphs` its recorded steps, `work_queue` streams, events and
graphs, `completions` the thread that answers. Only `spec` and `process` may be imported by the engine: the others
import torch.
"""
