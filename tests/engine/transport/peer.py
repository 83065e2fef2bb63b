"""Processes for the tests. `peer.py worker SPEC LIFE_FD SPIN_S` echoes; `peer.py engine NAME BACKING BELL` starts a
worker of its own, says so on its standard output, and then waits to be killed.

The worker answers `EncodePrompt` with a `Failed` that repeats the prompt, `Ping(n)` with one `Pong(n)`,
`LoadWeights(n)` with n `Pong`s in a row, `CopyLatents` by a pause of `slot` µs and then a `Pong`.
"""

import os
import subprocess
import sys
import time

import msgspec

from tetrion.engine.messages import CopyLatents, EncodePrompt, Failed, LoadWeights, Ping, Pong
from tetrion.engine.transport.channel import ChannelSpec, EngineGone, WorkerEnd, attach_channel, create_channel
from tetrion.engine.transport.doorbell import DoorbellKind
from tetrion.engine.transport.segment import Backing


def work(worker: WorkerEnd) -> None:
    send = worker.events.send
    while True:
        match worker.commands.receive():
            case EncodePrompt(command_id=n, request_id=request_id, prompt=prompt):
                send(Failed(command_id=n, device_id=0, request_id=request_id, kind="error", message=prompt))
            case Ping(command_id=n):
                send(Pong(command_id=n, device_id=0))
            case LoadWeights(command_id=n):
                for i in range(n):
                    send(Pong(command_id=i, device_id=0))
            case CopyLatents(command_id=n, slot=microseconds):
                time.sleep(microseconds * 1e-6)
                send(Pong(command_id=n, device_id=0))
            case other:
                raise ValueError(f"no test sends {other!r}")


def worker_main(spec_json: str, life_fd: str, spin_s: str) -> None:
    worker = attach_channel(msgspec.json.decode(spec_json, type=ChannelSpec), int(life_fd), float(spin_s))
    try:
        work(worker)
    except EngineGone:
        os.write(1, b"engine gone\n")


def engine_main(name: str, backing: str, bell: str) -> None:
    engine = create_channel(name, backing=msgspec.convert(backing, Backing), bell=msgspec.convert(bell, DoorbellKind))
    life_fd, _engine_life_fd = os.pipe()
    arguments = [msgspec.json.encode(engine.spec).decode(), str(life_fd), "0"]
    worker = subprocess.Popen(
        [sys.executable, "-P", __file__, "worker", *arguments], pass_fds=(*engine.spec.fds, life_fd)
    )
    engine.commands.send(msgspec.msgpack.encode(Ping(command_id=1)))
    while not engine.events.drain():
        time.sleep(0.001)
    os.write(1, f"worker {worker.pid} answers\n".encode())
    time.sleep(600)


if __name__ == "__main__":
    {"worker": worker_main, "engine": engine_main}[sys.argv[1]](*sys.argv[2:])
