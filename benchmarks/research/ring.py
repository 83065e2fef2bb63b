"""`python -m benchmarks.research ring`: the time from engine to worker and back for a command that does nothing.

Real channels and a real spawned process; beside them `multiprocessing.Queue` in the same run. The worker waits as in
service, in `CommandReceiver.receive`: it spins at most 200 µs, then sleeps on its doorbell. The engine's side waits in
two ways, a row each: `ring, poll` spins at most 200 µs over `EventReceiver.poll`, then sleeps in `select.poll` on the
doorbell, the quickest way for a caller without an event loop; `ring, uvloop` (`ring, asyncio` without uvloop) never
spins but lets the event loop call `drain` when the doorbell rings, as an asyncio engine does.
"""

import asyncio
import importlib.util
import multiprocessing
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.research.ring_echo import echo_queues
from tetrion.engine.messages import Event, Ping, Pong
from tetrion.engine.transport.channel import SPIN_S, EngineEnd, create_channel, send_to_all
from tetrion.entrypoints.record import as_text, check_writable, make_record, write_record

SILENCE_S = 0.005
TARGETS_US = {0.0: (60.0, 300.0), SILENCE_S: (150.0, 500.0)}
"""Wanted of the ring on an idle machine: silence before each round trip (s) → (p50, p99)."""

_WARMUP = 50
_ANSWER_TIMEOUT_S = 30.0

RoundTrip = Callable[[int], None]


def run(num_round_trips: int = 2000, num_after_silence: int = 500, queue: bool = True) -> dict[str, Any]:
    """Measure. `num_round_trips` back to back and `num_after_silence` with 5 ms of silence before each, per way.

    Returns {"host": …, "rows": [{"transport", "silence_ms", "num_round_trips", "p50_us", "p99_us", "max_us",
    "target_p50_us", "target_p99_us"}]} (targets null where none is set). Raises ValueError for counts below 1,
    TimeoutError if the other process does not answer.
    """
    if num_round_trips < 1 or num_after_silence < 1:
        raise ValueError(f"counts of round trips must be ≥ 1, got {num_round_trips} and {num_after_silence}")
    counts = {0.0: num_round_trips, SILENCE_S: num_after_silence}
    rows = []
    with _channel() as engine:
        rows += [_row("ring, poll", s, n, _measure(_through_select(engine), s, n)) for s, n in counts.items()]
    with _channel() as engine:
        rows += [_row(f"ring, {_event_loop()}", s, n, _measure_asyncio(engine, s, n)) for s, n in counts.items()]
    if queue:
        with _queues() as round_trip:
            rows += [_row("multiprocessing.Queue", s, n, _measure(round_trip, s, n)) for s, n in counts.items()]
    line = f"python -m benchmarks.research ring --num-round-trips {num_round_trips}"
    line += f" --num-after-silence {num_after_silence}"
    return make_record(line, rows)


def render(result: dict[str, Any]) -> str:
    """The result as a small table of plain text."""
    host = result["host"]
    lines = [
        f"{host['cpu']}, {host['num_cores']} cores (load {host['load_1min']:.1f}), "
        f"{host['python']}, {host['system']}; spin at most {1e6 * SPIN_S:.0f} µs",
        f"{'round trip over':24}{'silence':>9}{'p50 µs':>10}{'p99 µs':>10}{'max µs':>10}   wanted (idle machine)",
    ]
    for row in result["rows"]:
        wanted = f"≤ {row['target_p50_us']:.0f} / {row['target_p99_us']:.0f}" if row["target_p50_us"] else ""
        figures = "".join(f"{row[name]:>10.1f}" for name in ("p50_us", "p99_us", "max_us"))
        lines.append(f"{row['transport']:24}{row['silence_ms']:>6.0f} ms{figures}   {wanted}".rstrip())
    return "\n".join(lines)


def command(
    num_round_trips: int = 2000, num_after_silence: int = 500, output: Path | None = None, as_json: bool = False
) -> dict[str, Any]:
    """What `python -m benchmarks.research ring` does: measure, print the table (or one JSON object), write `output`."""
    check_writable(output, "output")
    result = run(num_round_trips, num_after_silence)
    try:
        write_record(result, output)
    finally:
        print(as_text(result) if as_json else render(result))
    return result


@contextmanager
def _channel() -> Iterator[EngineEnd]:
    """A channel with an echo process at its other end."""
    engine = create_channel("bench")
    life_fd, engine_life_fd = os.pipe()
    arguments = [msgspec.json.encode(engine.spec).decode(), str(life_fd)]
    process = subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).with_name("ring_echo.py")), *arguments],
        pass_fds=(*engine.spec.fds, life_fd),
    )
    os.close(life_fd)
    try:
        yield engine
    finally:
        os.close(engine_life_fd)
        _end(process)
        engine.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    """The echo process ends by itself once its life pipe is closed."""
    try:
        process.wait(_ANSWER_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _through_select(engine: EngineEnd) -> RoundTrip:
    sleeper = select.poll()
    sleeper.register(engine.events.fileno(), select.POLLIN)

    def wait() -> list[Event]:
        spin_until_s = time.monotonic() + SPIN_S
        while time.monotonic() < spin_until_s:
            if events := engine.events.poll():
                return events
            os.sched_yield()  # the worker may share this core
        while not (events := engine.events.drain()):
            if not sleeper.poll(_ANSWER_TIMEOUT_S * 1000):
                raise TimeoutError(f"no answer within {_ANSWER_TIMEOUT_S} s")
        return events

    def round_trip(command_id: int) -> None:
        send_to_all([engine.commands], Ping(command_id=command_id))
        _check(wait(), command_id)

    return round_trip


def _measure(round_trip: RoundTrip, silence_s: float, count: int) -> list[float]:
    """Seconds of each round trip, after a warm-up."""
    for command_id in range(_WARMUP):
        round_trip(command_id)
    times_s = []
    for command_id in range(count):
        if silence_s:
            time.sleep(silence_s)
        start_s = time.perf_counter()
        round_trip(command_id)
        times_s.append(time.perf_counter() - start_s)
    return times_s


def _measure_asyncio(engine: EngineEnd, silence_s: float, count: int) -> list[float]:
    async def measure() -> list[float]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[Event]] = loop.create_future()

        def on_events() -> None:
            events = engine.events.drain()
            if events:
                answer.set_result(events)

        engine.events.drain()
        loop.add_reader(engine.events.fileno(), on_events)
        times_s = []
        for command_id in range(_WARMUP + count):
            if silence_s:
                await asyncio.sleep(silence_s)
            answer = loop.create_future()
            start_s = time.perf_counter()
            send_to_all([engine.commands], Ping(command_id=command_id))
            events = await asyncio.wait_for(answer, _ANSWER_TIMEOUT_S)
            times_s.append(time.perf_counter() - start_s)
            _check(events, command_id)
        loop.remove_reader(engine.events.fileno())
        return times_s[_WARMUP:]

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(measure())


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    if _event_loop() == "asyncio":
        return asyncio.new_event_loop
    import uvloop

    return uvloop.new_event_loop


def _event_loop() -> str:
    return "uvloop" if importlib.util.find_spec("uvloop") else "asyncio"


@contextmanager
def _queues() -> Iterator[RoundTrip]:
    """The same echo over two `multiprocessing.Queue`s, which pickle and hand over to a thread of their own."""
    context = multiprocessing.get_context("spawn")
    commands, events = context.Queue(), context.Queue()
    process = context.Process(target=echo_queues, args=(commands, events), daemon=True)
    process.start()

    def round_trip(command_id: int) -> None:
        commands.put(Ping(command_id=command_id))
        _check([events.get(timeout=_ANSWER_TIMEOUT_S)], command_id)

    try:
        yield round_trip
        commands.put(None)
        process.join(_ANSWER_TIMEOUT_S)
    finally:
        process.kill()
        process.join()
        for queue in (commands, events):
            queue.cancel_join_thread()
            queue.close()


def _check(events: list[Event], command_id: int) -> None:
    expected = [Pong(command_id=command_id, device_id=0)]
    if events != expected:
        raise RuntimeError(f"round trip {command_id}: expected {expected}, got {events}")


def _row(transport: str, silence_s: float, count: int, times_s: list[float]) -> dict[str, Any]:
    times_us = sorted(1e6 * t for t in times_s)
    p50, p99 = TARGETS_US[silence_s] if transport.startswith("ring") else (None, None)
    return {
        "transport": transport,
        "silence_ms": 1e3 * silence_s,
        "num_round_trips": count,
        "p50_us": _percentile(times_us, 50),
        "p99_us": _percentile(times_us, 99),
        "max_us": times_us[-1],
        "target_p50_us": p50,
        "target_p99_us": p99,
    }


def _percentile(ascending: list[float], percent: int) -> float:
    """Nearest rank: the smallest value that at least `percent` in a hundred do not exceed."""
    return ascending[-(-len(ascending) * percent // 100) - 1]


if __name__ == "__main__":
    command(as_json="--json" in sys.argv[1:])
