"""Real processes: back-pressure, sleeping and waking, death of either side."""

import asyncio
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop

from tetrion.engine.messages import CopyLatents, EncodePrompt, Event, Failed, LoadWeights, Ping, Pong
from tetrion.engine.transport.channel import EngineEnd, create_channel, send_to_all
from tetrion.engine.transport.doorbell import DoorbellKind
from tetrion.engine.transport.segment import Backing

Kinds = tuple[Backing, DoorbellKind]
Fill = Callable[..., Any]
needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks for memory in Linux's /proc")


class Worker:
    """A worker process, the engine's end of its channel, and a pipe whose other end only the worker holds."""

    def __init__(self, peer_path: Path, engine: EngineEnd, spin_s: float) -> None:
        self.engine = engine
        life_fd, self.engine_life_fd = os.pipe()
        self.worker_life_fd, held_by_worker_fd = os.pipe()
        arguments = [msgspec.json.encode(engine.spec).decode(), str(life_fd), str(spin_s)]
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(peer_path), "worker", *arguments],
            pass_fds=(*engine.spec.fds, life_fd, held_by_worker_fd),
            stdout=subprocess.PIPE,
        )
        os.close(life_fd)
        os.close(held_by_worker_fd)

    def next_events(self, timeout_s: float = 20.0) -> list[Event]:
        """Sleep on the doorbell until there is something. A lost wake-up ends here."""
        poller = select.poll()
        poller.register(self.engine.events.fileno(), select.POLLIN)
        while not (events := self.engine.events.drain()):
            assert poller.poll(timeout_s * 1000), "the doorbell did not ring"
        return events

    def end(self) -> bytes:
        """End as a worker ends when the engine goes; what it said."""
        os.close(self.engine_life_fd)
        os.close(self.worker_life_fd)
        said, _ = self.process.communicate(timeout=20)
        return said


@pytest.fixture
def start(kinds: Kinds, peer_path: Path) -> Iterator[Callable[..., Worker]]:
    with ExitStack() as cleanup:

        def make(
            ring_bytes: int = 4096, spin_s: float = 0.0, name: str = "test", queue: tuple[bytes, ...] = ()
        ) -> Worker:
            engine = create_channel(name, ring_bytes, backing=kinds[0], bell=kinds[1])
            cleanup.callback(engine.close)
            for encoded in queue:
                engine.commands.send(encoded)
            worker = Worker(peer_path, engine, spin_s)
            cleanup.callback(worker.process.wait)
            cleanup.callback(worker.process.kill)
            return worker

        yield make


def test_thousands_of_messages_under_back_pressure(start: Callable[..., Worker], fill: Fill) -> None:
    """A ring of 2 KiB, messages up to 1 KiB, the engine sending whenever there is room: all come back, in order."""
    draw = random.Random(1)
    prompts = ["x" * draw.choice((0, 10, 100, draw.randrange(1000))) for _ in range(4000)]
    commands = [fill(EncodePrompt, command_id=i, prompt=prompt) for i, prompt in enumerate(prompts)]
    worker, sent, num_refused = start(2048), 0, 0
    received: list[Event] = []
    while len(received) < len(prompts):
        while sent < len(prompts) and send_to_all([worker.engine.commands], commands[sent]):
            sent += 1
        num_refused += sent < len(prompts)
        received += worker.next_events() if len(received) < sent else []
    assert num_refused > 0
    assert received == [
        Failed(command_id=i, device_id=0, request_id="", kind="error", message=prompt)
        for i, prompt in enumerate(prompts)
    ]
    assert worker.end() == b"engine gone\n"


def test_a_worker_waits_for_room_when_the_engine_is_slow(start: Callable[..., Worker]) -> None:
    """3000 events through a ring that holds about 60 of them, while the engine looks away at first."""
    worker = start(2048)
    send_to_all([worker.engine.commands], LoadWeights(command_id=3000, publish=False))
    time.sleep(0.3)
    assert worker.process.poll() is None
    received: list[Event] = []
    while len(received) < 3000:
        received += worker.next_events()
    assert received == [Pong(command_id=i, device_id=0) for i in range(3000)]
    assert worker.end() == b"engine gone\n"


@pytest.mark.parametrize("spin_s", [0.0, 100e-6], ids=["no spin", "spin"])
def test_no_wake_up_is_lost(start: Callable[..., Worker], fill: Fill, spin_s: float) -> None:
    """Pauses on both sides drawn around the moments at which the other goes to sleep."""
    worker, draw = start(spin_s=spin_s), random.Random(2)
    for i in range(2500):
        send_to_all([worker.engine.commands], fill(CopyLatents, command_id=i, slot=draw.choice((0, 0, 1, 30))))
        busy_until_s = time.perf_counter() + draw.choice((0.0, draw.uniform(0, 150e-6)))
        while time.perf_counter() < busy_until_s:
            pass
        assert worker.next_events() == [Pong(command_id=i, device_id=0)]
        if draw.random() < 0.2:
            time.sleep(draw.uniform(0, 400e-6))
    assert worker.end() == b"engine gone\n"


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_an_event_loop_sleeps_until_something_happens(
    start: Callable[..., Worker], fill: Fill, make_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    worker, draw = start(), random.Random(3)

    async def exchange() -> None:
        rung = asyncio.Event()
        asyncio.get_running_loop().add_reader(worker.engine.events.fileno(), rung.set)
        for i in range(500):
            command = fill(CopyLatents, command_id=i, slot=draw.choice((0, 1, 50, 300)))
            send_to_all([worker.engine.commands], command)
            while not (events := worker.engine.events.drain()):
                rung.clear()
                await asyncio.wait_for(rung.wait(), 20)
            assert events == [Pong(command_id=i, device_id=0)]
        asyncio.get_running_loop().remove_reader(worker.engine.events.fileno())

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(exchange())
    assert worker.end() == b"engine gone\n"


def test_commands_queued_before_the_worker_starts(start: Callable[..., Worker]) -> None:
    worker = start(queue=tuple(msgspec.msgpack.encode(Ping(command_id=i)) for i in range(9)))
    received: list[Event] = []
    while len(received) < 9:
        received += worker.next_events()
    assert received == [Pong(command_id=i, device_id=0) for i in range(9)]


@contextmanager
def engine_process(peer_path: Path, kinds: Kinds, name: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """An engine with one worker that has answered, and the worker's process id."""
    process = subprocess.Popen([sys.executable, "-P", str(peer_path), "engine", name, *kinds], stdout=subprocess.PIPE)
    assert process.stdout is not None
    worker_pid = int(process.stdout.readline().split()[1])
    try:
        yield process, worker_pid
    finally:
        process.kill()
        process.communicate(timeout=20)


@needs_proc
def test_killing_the_engine_ends_the_worker_and_leaves_no_memory(
    kinds: Kinds, peer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    name = uuid.uuid4().hex
    tag = name if kinds[0] == "memfd" else str(tmp_path)
    with engine_process(peer_path, kinds, name) as (engine, worker_pid):
        assert {pid for pid, _ in holders(tag)} >= {engine.pid, worker_pid}
        os.kill(engine.pid, signal.SIGKILL)
        assert engine.stdout is not None
        assert engine.stdout.read() == b"engine gone\n", "the worker's last word, then end of file as it exits"
    assert_gone(tag)
    assert list(tmp_path.iterdir()) == []


@needs_proc
def test_killing_the_worker_is_seen_at_once_and_leaves_no_memory(
    start: Callable[..., Worker], kinds: Kinds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    name = uuid.uuid4().hex
    tag = name if kinds[0] == "memfd" else str(tmp_path)
    worker = start(name=name)
    send_to_all([worker.engine.commands], Ping(command_id=1))
    assert worker.next_events() == [Pong(command_id=1, device_id=0)]
    assert {pid for pid, _ in holders(tag)} == {os.getpid(), worker.process.pid}
    worker.process.kill()
    poller = select.poll()
    poller.register(worker.worker_life_fd, select.POLLIN)
    assert poller.poll(20_000), "the pipe that only the worker held has closed"
    worker.process.wait(20)
    assert {pid for pid, _ in holders(tag)} == {os.getpid()}
    assert send_to_all([worker.engine.commands], Ping(command_id=2)), "sending to the dead harms nobody"
    assert worker.engine.events.drain() == []
    worker.engine.close()
    assert_gone(tag)
    assert list(tmp_path.iterdir()) == []


@needs_proc
def test_events_sent_before_the_worker_died_are_still_read(start: Callable[..., Worker]) -> None:
    worker = start(1 << 16)
    send_to_all([worker.engine.commands], LoadWeights(command_id=100, publish=False))
    ring = worker.engine.channels[1].ring
    send_to_all([worker.engine.commands], Ping(command_id=100))
    received = worker.next_events()
    while len(received) < 50:
        received += worker.next_events()
    worker.process.kill()
    worker.process.wait(20)
    received += worker.engine.events.drain()
    assert received == [Pong(command_id=i, device_id=0) for i in range(len(received))]
    assert ring.try_read() is None


def holders(tag: str) -> set[tuple[int, str]]:
    """(process id, what) for every open descriptor and mapping of a file with `tag` in its name, in any process."""
    found = set()
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal():
            continue
        with suppress(OSError):  # it may end while we look
            for line in (process / "maps").read_text().splitlines():
                if tag in line:
                    found.add((int(process.name), "mapping"))
            for fd in (process / "fd").iterdir():
                with suppress(OSError):
                    if tag in os.readlink(fd):
                        found.add((int(process.name), "descriptor"))
    return found


def assert_gone(tag: str) -> None:
    """Nobody holds the memory, once processes that were killed have been cleared away by the system."""
    until_s = time.monotonic() + 10
    while (left := holders(tag)) and time.monotonic() < until_s:
        time.sleep(0.01)
    assert left == set()
    shared_memory = Path("/dev/shm")
    assert [path.name for path in shared_memory.iterdir() if "tetrion" in path.name or tag in path.name] == []
