"""The codec, group sending and the waiting rules, with both ends in this process."""

import os
import select
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tetrion.engine.messages import Denoise, EncodePrompt, Event, Failed, Ping, Pong
from tetrion.engine.transport.channel import (
    RING_BYTES,
    EngineEnd,
    EngineGone,
    MalformedMessage,
    WorkerEnd,
    encode_command,
    send_to_all,
)
from tetrion.engine.transport.ring import MessageTooLong, RingFull

MakeEnds = Callable[..., tuple[EngineEnd, WorkerEnd]]
Fill = Callable[..., Any]


def is_ready(engine: EngineEnd) -> bool:
    poller = select.poll()
    poller.register(engine.events.fileno(), select.POLLIN)
    return bool(poller.poll(0))


@pytest.fixture
def life() -> Iterator[tuple[int, int]]:
    read_fd, write_fd = os.pipe()
    yield read_fd, write_fd
    os.close(read_fd)


def test_messages_arrive_as_they_were_sent(both_ends: MakeEnds, fill: Fill) -> None:
    denoise = fill(Denoise, command_id=1, request_id="r", members=(2, 0), chunk_steps=3)
    engine, worker = both_ends()
    assert send_to_all([engine.commands], denoise)
    assert worker.commands.receive(1.0) == denoise
    event = Failed(command_id=1, device_id=0, request_id="ü", kind="aborted", message="\n")
    worker.events.send(event)
    assert engine.events.drain() == [event] and engine.events.drain() == []


def test_a_group_command_goes_to_all_or_to_none(both_ends: MakeEnds) -> None:
    (first, first_worker), (second, second_worker) = both_ends(128), both_ends(128)
    while send_to_all([second.commands], Ping(command_id=0)):
        pass
    assert not send_to_all([first.commands, second.commands], Ping(command_id=1))
    assert first_worker.commands.receive(0.0) is None
    assert second_worker.commands.receive(0.0) == Ping(command_id=0)
    assert send_to_all([first.commands, second.commands], Ping(command_id=1))
    assert first_worker.commands.receive(0.0) == Ping(command_id=1)
    received = []
    while (command := second_worker.commands.receive(0.0)) is not None:
        received.append(command)
    assert received[-1] == Ping(command_id=1) and set(received[:-1]) == {Ping(command_id=0)}


def test_a_too_long_group_command_is_found_even_if_another_ring_is_full(both_ends: MakeEnds, fill: Fill) -> None:
    denoise = fill(Denoise, command_id=1, request_id="r", members=(2, 0), chunk_steps=3)
    (full, full_worker), (small, small_worker) = both_ends(4096), both_ends(64)
    while send_to_all([full.commands], denoise):
        pass
    with pytest.raises(MessageTooLong, match="takes at most 56"):
        send_to_all([full.commands, small.commands], denoise)
    assert small_worker.commands.receive(0.0) is None and full_worker.commands.receive(0.0) == denoise


def test_a_full_ring_is_an_error_for_who_cannot_wait(both_ends: MakeEnds) -> None:
    engine, worker = both_ends(128)
    encoded = encode_command(Ping(command_id=5))
    num_sent = 0
    while engine.commands.can_send(encoded):
        engine.commands.send(encoded)
        num_sent += 1
    with pytest.raises(RingFull, match=rf"command of {len(encoded)} bytes: \d+ of 128 free"):
        engine.commands.send(encoded)
    received = 0
    while worker.commands.receive(0.0) is not None:
        received += 1
    assert received == num_sent > 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x81\xa4type\xa4Pung",
        encode_command(Ping(command_id=1))[:-1],
        b"\x82\xa4type\xa4Ping\xaacommand_id\xa1x",
    ],
    ids=["empty", "not msgpack", "unknown tag", "cut short", "wrong type"],
)
def test_malformed_messages_are_clear_errors(both_ends: MakeEnds, data: bytes) -> None:
    engine, worker = both_ends()
    engine.channels[0].try_write(data)
    with pytest.raises(MalformedMessage, match=rf"^{len(data)} bytes that are no command: "):
        worker.commands.receive(0.0)
    data = data.replace(b"Ping", b"Pong")
    worker.events._channel.try_write(data)
    with pytest.raises(MalformedMessage, match=rf"^{len(data)} bytes that are no event: "):
        engine.events.drain()


def test_a_command_is_not_an_event(both_ends: MakeEnds) -> None:
    engine, worker = both_ends()
    worker.events._channel.try_write(encode_command(Ping(command_id=1)))
    with pytest.raises(MalformedMessage, match="no event: Invalid value 'Ping'"):
        engine.events.drain()


def test_the_doorbell_rings_only_for_who_has_drained(both_ends: MakeEnds) -> None:
    engine, worker = both_ends()
    assert engine.events.drain() == [] and not is_ready(engine)
    worker.events.send(Pong(command_id=1, device_id=0))
    assert is_ready(engine)
    assert engine.events.drain() == [Pong(command_id=1, device_id=0)] and not is_ready(engine)
    assert engine.events.poll() == []
    worker.events.send(Pong(command_id=2, device_id=0))
    assert not is_ready(engine), "after poll the engine is awake: no system call is spent on it"
    assert engine.events.drain() == [Pong(command_id=2, device_id=0)]


def test_drain_is_bounded_and_leaves_the_doorbell_ringing(both_ends: MakeEnds) -> None:
    engine, worker = both_ends(1 << 20)
    for i in range(1500):
        worker.events.send(Pong(command_id=i, device_id=0))
    first = engine.events.drain()
    assert len(first) == 1024 and is_ready(engine)
    rest = engine.events.drain()
    assert first + rest == [Pong(command_id=i, device_id=0) for i in range(1500)] and not is_ready(engine)


def test_receive_times_out(both_ends: MakeEnds) -> None:
    _, worker = both_ends()
    assert worker.commands.receive(0.0) is None
    assert worker.commands.receive(0.01) is None


def test_receive_raises_when_the_engine_is_gone_and_nothing_is_left(both_ends: MakeEnds, life: tuple[int, int]) -> None:
    engine, worker = both_ends(life_fd=life[0])
    send_to_all([engine.commands], Ping(command_id=3))
    os.close(life[1])
    assert worker.commands.receive() == Ping(command_id=3)
    with pytest.raises(EngineGone, match="the engine has ended"):
        worker.commands.receive()
    with pytest.raises(EngineGone):
        worker.commands.receive(0.0)


def test_a_sleeping_receiver_wakes_when_the_engine_goes(both_ends: MakeEnds, life: tuple[int, int]) -> None:
    _, worker = both_ends(life_fd=life[0])
    timer = threading.Timer(0.05, os.close, [life[1]])
    timer.start()
    with pytest.raises(EngineGone):
        worker.commands.receive(60.0)
    timer.join()


def test_send_waits_for_room(both_ends: MakeEnds, life: tuple[int, int]) -> None:
    engine, worker = both_ends(64, life_fd=life[0])
    events = [Pong(command_id=i, device_id=0) for i in range(50)]

    def send_all() -> None:
        for event in events:
            worker.events.send(event)

    thread = threading.Thread(target=send_all)
    thread.start()
    received: list[Event] = []
    poller = select.poll()
    poller.register(engine.events.fileno(), select.POLLIN)
    while len(received) < len(events):
        received += engine.events.drain()
        assert len(received) == len(events) or poller.poll(10_000)
    thread.join()
    assert received == events
    os.close(life[1])


def test_send_gives_up_when_the_engine_is_gone(both_ends: MakeEnds, life: tuple[int, int]) -> None:
    _, worker = both_ends(64, life_fd=life[0])
    os.close(life[1])
    with pytest.raises(EngineGone, match="a Pong event could not be delivered"):
        for _ in range(50):
            worker.events.send(Pong(command_id=1, device_id=0))


def test_send_gives_up_after_its_timeout(both_ends: MakeEnds) -> None:
    _, worker = both_ends(64)
    with pytest.raises(TimeoutError, match=r"still full after 0\.01 s"):
        for _ in range(50):
            worker.events.send(Pong(command_id=1, device_id=0), timeout_s=0.01)


def test_an_event_beyond_the_ring_is_an_error_at_once(both_ends: MakeEnds) -> None:
    _, worker = both_ends(64)
    with pytest.raises(MessageTooLong, match="takes at most 56"):
        worker.events.send(Failed(command_id=1, device_id=0, request_id="r", kind="error", message="x" * 100))


def test_a_long_prompt_fits_the_default_ring(both_ends: MakeEnds, fill: Fill) -> None:
    engine, worker = both_ends(RING_BYTES)
    assert send_to_all([engine.commands], fill(EncodePrompt, prompt="ö" * 50_000))
    command = worker.commands.receive(1.0)
    assert isinstance(command, EncodePrompt) and command.prompt == "ö" * 50_000
