"""The worker process, one per device: executes commands in FIFO order and answers each with one event.

`spec` what a worker is told at its start · `__main__` entry and command loop · `runner` what each command does ·
`process` the engine's handle on a worker process. Only `spec` and `process` may be imported by the engine: the others
import torch.
"""
