"""What a worker process does: map what the engine shared, then execute commands until told to stop."""

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from typing import Protocol

import torch

from tetrion.engine.messages import (
    Command,
    CopyLatents,
    Decode,
    Denoise,
    EncodePrompt,
    Event,
    LoadWeights,
    MapPeers,
    Ping,
    Pong,
    ResetBarriers,
    Shutdown,
    Started,
    UnmapPeers,
)
from tetrion.engine.model_spec import CheckpointError
from tetrion.engine.parallel.cpu.barrier import Aborted
from tetrion.engine.transport.channel import EngineGone, attach_channel
from tetrion.engine.worker.failures import NotFinite, failure_of
from tetrion.engine.worker.spec import WorkerSpec

Send = Callable[[Event], None]
Receive = Callable[[float | None], Command | None]
"""The next command, or None if none comes within so many seconds."""
IDLE_S = 0.002
"""The engine sends what follows a command within less, if it is known already."""
ENGINE_GONE = 1
"""What a worker exits with whose engine has ended."""


class CommandRunner(Protocol):
    """Carries commands out. None: the answer will be sent when the command's work is done.

    `rehearse` is called while `has_to_rehearse` and no command has come for `IDLE_S`.
    """

    @property
    def has_to_rehearse(self) -> bool: ...

    def rehearse(self) -> None: ...
    def load(self, command: LoadWeights) -> Event | None: ...
    def map_peers(self, command: MapPeers) -> Event | None: ...
    def unmap_peers(self, command: UnmapPeers) -> Event | None: ...
    def reset_barriers(self, command: ResetBarriers) -> Event | None: ...
    def encode(self, command: EncodePrompt) -> Event | None: ...
    def denoise(self, command: Denoise) -> Event | None: ...
    def decode(self, command: Decode) -> Event | None: ...
    def copy_latents(self, command: CopyLatents) -> Event | None: ...


def run(spec: WorkerSpec) -> None:
    """Be a worker. Returns on `Shutdown`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_engine(spec.engine_life_fd)
    torch.set_num_threads(spec.num_threads)
    torch.set_grad_enabled(False)
    commands, events = attach_channel(spec.channel, spec.engine_life_fd)
    run_on_device = run_on_cpu if spec.device.kind == "cpu" else run_on_gpu
    try:
        run_on_device(spec, commands.receive, events.send)
    except EngineGone:
        os._exit(ENGINE_GONE)  # nobody is left to be told, as `exit_with_engine` is about to find


def run_on_cpu(spec: WorkerSpec, receive: Receive, send: Send) -> None:
    from tetrion.engine.worker.cpu import AtOnce, CpuBackend
    from tetrion.engine.worker.runner import Runner

    device_id = spec.device.device_id
    runner = Runner(spec, CpuBackend(spec), AtOnce(send))
    send(Started(device_id=device_id, pid=os.getpid()))
    serve(runner, device_id, receive, send)


def run_on_gpu(spec: WorkerSpec, receive: Receive, send: Send) -> None:
    """All events go through the completions' thread. A GPU that failed for good takes its worker with it."""
    from tetrion.engine.worker.completions import Completions
    from tetrion.engine.worker.gpu import GpuBackend
    from tetrion.engine.worker.runner import Runner
    from tetrion.engine.worker.work_queue import CudaQueue

    device_id = spec.device.device_id
    queue = CudaQueue(spec.device.index)
    completions = Completions(device_id, send, on_broken=lambda: os._exit(1), on_start=queue.attach_thread)
    backend = GpuBackend(spec, queue)
    runner = Runner(spec, backend, completions)
    completions.send(Started(device_id=device_id, pid=os.getpid(), slab=backend.slab))
    serve(runner, device_id, receive, completions.send)
    completions.close()


def serve(runner: CommandRunner, device_id: int, receive: Receive, send: Send) -> None:
    """Execute commands until `Shutdown`."""
    while not isinstance(command := receive(IDLE_S if runner.has_to_rehearse else None), Shutdown):
        if command is None:
            runner.rehearse()
        elif (event := execute(runner, command, device_id)) is not None:
            send(event)


def execute(runner: CommandRunner, command: Command, device_id: int) -> Event | None:
    """Carry out one command. Whatever goes wrong becomes a `Failed` event: a worker is never silent."""
    try:
        match command:
            case EncodePrompt():
                return runner.encode(command)
            case Denoise():
                return runner.denoise(command)
            case Decode():
                return runner.decode(command)
            case CopyLatents():
                return runner.copy_latents(command)
            case LoadWeights():
                return runner.load(command)
            case MapPeers():
                return runner.map_peers(command)
            case UnmapPeers():
                return runner.unmap_peers(command)
            case ResetBarriers():
                return runner.reset_barriers(command)
            case Ping():
                return Pong(command_id=command.command_id, device_id=device_id)
            case Shutdown():
                raise AssertionError("handled by the loop")
    except Exception as error:
        if not isinstance(error, (Aborted, NotFinite, MemoryError, torch.OutOfMemoryError, CheckpointError)):
            traceback.print_exc()
        return failure_of(command, device_id, error)


def exit_with_engine(engine_life_fd: int) -> None:
    """A worker outlives no engine: end-of-file on the engine's life pipe ends this process, whatever it is doing."""

    def watch() -> None:
        while os.read(engine_life_fd, 1):
            time.sleep(0)
        os._exit(ENGINE_GONE)

    threading.Thread(target=watch, name="engine-watch", daemon=True).start()
