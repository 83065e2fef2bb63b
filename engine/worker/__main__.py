"""Entry of a worker process: map what the engine shared, then execute commands until told to stop."""

import os
import signal
import sys
import threading
import time
import traceback
from typing import Literal

import msgspec
import torch

from tetrion.engine.messages import (
    BarriersReset,
    Command,
    CopyLatents,
    Decode,
    Denoise,
    EncodePrompt,
    Event,
    Failed,
    GroupCommand,
    LoadWeights,
    Ping,
    Pong,
    ResetBarriers,
    Shutdown,
    Started,
)
from tetrion.engine.parallel.barrier import Aborted
from tetrion.engine.transport.channel import attach_channel
from tetrion.engine.worker.runner import Runner
from tetrion.engine.worker.spec import WorkerSpec


def main() -> None:
    spec = msgspec.json.decode(sys.argv[1], type=WorkerSpec)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_engine(spec.engine_life_fd)
    torch.set_num_threads(spec.num_threads)
    torch.set_grad_enabled(False)
    commands, events = attach_channel(spec.channel, spec.engine_life_fd)
    runner = Runner(spec)
    device_id = spec.device.device_id
    events.send(Started(device_id=device_id, pid=os.getpid()))
    while True:
        command = commands.receive()
        if isinstance(command, Shutdown):
            return
        if command is not None:
            events.send(execute(runner, command, device_id))


def execute(runner: Runner, command: Command, device_id: int) -> Event:
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
            case ResetBarriers():
                runner.reset_barriers()
                return BarriersReset(command_id=command.command_id, device_id=device_id)
            case Ping():
                return Pong(command_id=command.command_id, device_id=device_id)
            case Shutdown():
                raise AssertionError("handled by the loop")
    except Aborted:
        return failed(command, device_id, "aborted", "aborted: another member of its group failed or was lost")
    except (MemoryError, torch.OutOfMemoryError) as error:
        return failed(command, device_id, "out_of_memory", f"out of memory: {error}")
    except Exception as error:
        traceback.print_exc()
        return failed(command, device_id, "error", f"{type(error).__name__}: {error}")


def failed(
    command: Command, device_id: int, kind: Literal["aborted", "out_of_memory", "error"], message: str
) -> Failed:
    return Failed(
        command_id=command.command_id,
        device_id=device_id,
        request_id=command.request_id if isinstance(command, GroupCommand) else "",
        kind=kind,
        message=message[:2000],
    )


def exit_with_engine(engine_life_fd: int) -> None:
    """A worker outlives no engine: end-of-file on the engine's life pipe ends this process, whatever it is doing."""

    def watch() -> None:
        while os.read(engine_life_fd, 1):
            time.sleep(0)
        os._exit(1)

    threading.Thread(target=watch, name="engine-watch", daemon=True).start()


if __name__ == "__main__":
    main()
