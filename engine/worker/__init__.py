"""The worker process, one per device: executes commands in FIFO order and answers each with one event.

`spec` what a worker is told at its start: only this may be imported by the engine, the others import torch. How it is
started is in `executors/fleet/`.

`fork_server` what CPU workers are forked from · `entry` the command loop · `runner` what each command does ·
`cpu` and `gpu` what a kind of device does in its own way · `denoiser` steps of a model, recorded once a shape ·
`recorded_encoders` prompts · `decoder_rehearsal` sizes that are new to a decoder · `work_queue` streams, events and
graphs · `completions` the thread that answers for a GPU · `failures` what a failed command is answered with.
"""
