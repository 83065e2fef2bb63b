"""A worker stands still for a while (SIGSTOP, SIGCONT): who waits for it, and does what it stores on waking do harm?

`measure_one`: one long stop, paired by request with an undisturbed run of the same arrivals. `measure_many`: short ones
at random moments, every picture compared.
"""

import asyncio
import random
import statistics
from contextlib import suppress
from pathlib import Path

from benchmarks.soak import load
from benchmarks.soak.faults import Event, stop_a_worker, stop_workers
from benchmarks.soak.report import Check, Row, at_most, finish, none_of
from benchmarks.soak.server import served, since

NUM_PICTURES = 16
SIZES = ((128, 128), (192, 192))
MAX_STEPS = 3
HEAD_S = 5.0
"""Of the load, before the worker is stopped."""
MOST_P95_S = 3.0


async def measure_one(
    *, workers: int, stopped_s: float, tail_s: float, share: float, capacity_s: float, seed: int
) -> tuple[list[Row], list[Check]]:
    async with served("--devices", f"cpu:{workers}") as server:
        pictures = await load.draw_undisturbed(server, load.catalogue(NUM_PICTURES, seed, MAX_STEPS, SIZES))
        capacity = await load.capacity_per_s(server, pictures, capacity_s)
        arrivals = load.poisson(pictures, share * capacity, HEAD_S + stopped_s + tail_s, seed)
        calm = await load.run_load(server, pictures, arrivals)
        before, events = await server.counters(), list[Event]()

        async def stop_later() -> None:
            await asyncio.sleep(HEAD_S)
            await stop_a_worker(server, stopped_s, random.Random(seed), events)

        struck, _ = await asyncio.gather(load.run_load(server, pictures, arrivals), stop_later())
        came_back = await server.until_alive(workers)
        counted = since(before, await server.counters())
    quiet, disturbed = load.summary(calm), load.summary(struck)
    later_s = load.differences_s(calm, struck)
    paired: Row = {
        "phase": "difference",
        "pairs": len(later_s),
        "p50_s": statistics.median(later_s) if later_s else None,
        "p95_s": load.quantile(later_s, 0.95) if later_s else None,
        "max_s": max(later_s, default=None),
        "differences_s": [round(one, 3) for one in later_s],
    }
    rows: list[Row] = [
        {"phase": "undisturbed", "capacity_per_s": capacity, **quiet},
        {"phase": "stopped", **disturbed, "events": events, "counters": counted},
        paired,
    ]
    checks = [
        none_of("wrong", quiet["wrong"] + disturbed["wrong"]),
        none_of("lost", quiet["lost"] + disturbed["lost"]),
        none_of("5xx", quiet["http_5xx"] + disturbed["http_5xx"]),
        none_of("tracebacks in the server's log", server.num_tracebacks),
        Check(name="all workers back", figure=came_back, bound="within 90 s", holds=came_back),
        at_most("p95 of the difference", paired["p95_s"], MOST_P95_S, " s"),
    ]
    return rows, checks


async def measure_many(
    *,
    workers: int,
    minutes: float,
    shortest_s: float,
    longest_s: float,
    every_s: float,
    share: float,
    capacity_s: float,
    seed: int,
) -> tuple[list[Row], list[Check]]:
    async with served("--devices", f"cpu:{workers}") as server:
        pictures = await load.draw_undisturbed(server, load.catalogue(NUM_PICTURES, seed, MAX_STEPS))
        capacity = await load.capacity_per_s(server, pictures, capacity_s)
        before, events = await server.counters(), list[Event]()
        stopping = asyncio.create_task(
            stop_workers(server, shortest_s, longest_s, every_s, random.Random(seed), events)
        )
        struck = await load.run_load(server, pictures, load.poisson(pictures, share * capacity, 60 * minutes, seed))
        stopping.cancel()
        with suppress(asyncio.CancelledError):
            await stopping
        came_back = await server.until_alive(workers)
        counted = since(before, await server.counters())
        again = [await load.ask_for(server, picture) for picture in pictures]
    disturbed = load.summary(struck)
    rows: list[Row] = [
        {"phase": "stops", "stops": len(events), "capacity_per_s": capacity, **disturbed, "counters": counted},
        {"phase": "after", "right": again.count("right"), "of": len(again)},
        {"phase": "events", "events": events},
    ]
    checks = [
        none_of("wrong", disturbed["wrong"] + again.count("wrong")),
        none_of("lost", disturbed["lost"] + again.count("lost")),
        none_of("5xx", disturbed["http_5xx"]),
        none_of("tracebacks in the server's log", server.num_tracebacks),
        Check(name="all workers back", figure=came_back, bound="within 90 s", holds=came_back),
    ]
    return rows, checks


def command_one(command_line: str, output: Path, **options: float) -> int:
    rows, checks = asyncio.run(measure_one(**options))  # type: ignore[arg-type]
    return finish(command_line, rows, checks, output)


def command_many(command_line: str, output: Path, **options: float) -> int:
    rows, checks = asyncio.run(measure_many(**options))  # type: ignore[arg-type]
    return finish(command_line, rows, checks, output)
