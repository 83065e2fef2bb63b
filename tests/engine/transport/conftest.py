"""Both ends of a channel in one process, and peers in processes of their own."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_origin

import msgspec
import pytest

from tetrion.engine.params import Params
from tetrion.engine.shape import StepShape
from tetrion.engine.transport.channel import (
    Channel,
    ChannelSpec,
    CommandReceiver,
    EngineEnd,
    EventSender,
    RingSpec,
    WorkerEnd,
    create_channel,
)
from tetrion.engine.transport.doorbell import DoorbellKind
from tetrion.engine.transport.ring import Ring
from tetrion.engine.transport.segment import Backing

PORTABLE = [
    pytest.param(
        ("memfd", "eventfd"),
        id="memfd+eventfd",
        marks=pytest.mark.skipif(not hasattr(os, "eventfd"), reason="this system has no memfd and eventfd"),
    ),
    pytest.param(("file", "pipe"), id="file+pipe"),
]

NO_PARAMS = Params(model="", shape=StepShape(width=0, height=0, image=0, text=()), num_steps=0, guidance=0.0, seed=0)


@pytest.fixture(params=PORTABLE)
def kinds(request: pytest.FixtureRequest) -> tuple[Backing, DoorbellKind]:
    """How memory and doorbell are made: as on Linux, and as where Linux's calls are missing."""
    return request.param


@pytest.fixture
def fill() -> Callable[..., Any]:
    """A function that makes a message of a type from the fields that matter; zero and empty for the others."""

    def make(message_type: type[msgspec.Struct], **fields: Any) -> msgspec.Struct:
        empty = {
            "int": 0,
            "float": 0.0,
            "str": "",
            "bool": False,
            "tuple": (),
            "Params": NO_PARAMS,
            "Union": None,
            "UnionType": None,
        }
        types = {field.name: field.type for field in msgspec.structs.fields(message_type)}
        names = {name: (get_origin(field_type) or field_type).__name__ for name, field_type in types.items()}
        return message_type(**({name: empty[type_name] for name, type_name in names.items()} | fields))

    return make


@pytest.fixture
def peer_path() -> Path:
    return Path(__file__).with_name("peer.py")


@pytest.fixture
def both_ends(kinds: tuple[Backing, DoorbellKind]) -> Iterator[Callable[..., tuple[EngineEnd, WorkerEnd]]]:
    """A function that makes an engine's end and, on duplicated descriptors, the worker's end in this same process."""
    with ExitStack() as cleanup:

        def make(ring_bytes: int = 4096, life_fd: int | None = None) -> tuple[EngineEnd, WorkerEnd]:
            engine = create_channel("test", ring_bytes, backing=kinds[0], bell=kinds[1])
            cleanup.callback(engine.close)
            spec = ChannelSpec(commands=_duplicate(engine.spec.commands), events=_duplicate(engine.spec.events))
            commands, events = Channel.attach(spec.commands), Channel.attach(spec.events)
            cleanup.callback(commands.close)
            cleanup.callback(events.close)
            return engine, WorkerEnd(CommandReceiver(commands, life_fd, spin_s=0.0), EventSender(events, life_fd))

        yield make


@pytest.fixture
def ring_ends(kinds: tuple[Backing, DoorbellKind]) -> Iterator[Callable[[int], tuple[Ring, Ring]]]:
    """A function that makes a ring's (producer, consumer), each with a mapping of its own."""
    with ExitStack() as cleanup:

        def make(capacity_bytes: int) -> tuple[Ring, Ring]:
            producer = Ring.create("test", capacity_bytes, backing=kinds[0])
            cleanup.callback(producer.close)
            consumer = Ring.attach(os.dup(producer.segment.fd), producer.segment.num_bytes)
            cleanup.callback(consumer.close)
            return producer, consumer

        yield make


def _duplicate(spec: RingSpec) -> RingSpec:
    read_fd = os.dup(spec.bell_read_fd)
    write_fd = read_fd if spec.bell_read_fd == spec.bell_write_fd else os.dup(spec.bell_write_fd)
    return RingSpec(
        segment_fd=os.dup(spec.segment_fd),
        segment_bytes=spec.segment_bytes,
        bell_read_fd=read_fd,
        bell_write_fd=write_fd,
    )
