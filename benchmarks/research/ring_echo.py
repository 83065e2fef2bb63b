"""The worker's half of `python -m benchmarks.research ring`: answers every `Ping` with a `Pong`, over a channel or over
queues.

Started as `python benchmarks/research/ring_echo.py CHANNEL_SPEC_JSON LIFE_FD`. Ends with the engine's process.
"""

import sys
from multiprocessing.queues import Queue

import msgspec

from tetrion.engine.messages import Ping, Pong
from tetrion.engine.transport.channel import ChannelSpec, EngineGone, attach_channel


def echo_channel(spec: ChannelSpec, life_fd: int) -> None:
    worker = attach_channel(spec, life_fd)
    try:
        while True:
            match worker.commands.receive():
                case Ping(command_id=command_id):
                    worker.events.send(Pong(command_id=command_id, device_id=0))
                case other:
                    raise ValueError(f"the echo worker answers Ping alone, got {other!r}")
    except EngineGone:
        return


def echo_queues(commands: "Queue[Ping | None]", events: "Queue[Pong]") -> None:
    """The same over two `multiprocessing.Queue`s, for comparison; None ends it."""
    while (command := commands.get()) is not None:
        events.put(Pong(command_id=command.command_id, device_id=0))


if __name__ == "__main__":
    echo_channel(msgspec.json.decode(sys.argv[1], type=ChannelSpec), int(sys.argv[2]))
