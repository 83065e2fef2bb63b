"""Workers are killed at random under load: is a picture wrong or lost, and how much later are they?

One server, one run: its capacity, a load at a share of it undisturbed, then the same load while workers die.
"""

import asyncio
import random
from contextlib import suppress
from pathlib import Path

from benchmarks.soak import load
from benchmarks.soak.faults import Event, kill_workers
from benchmarks.soak.report import Check, Row, at_most, finish, none_of
from benchmarks.soak.server import served, since

NUM_PICTURES = 24
MOST_P99_RATIO = 2.0


async def measure(
    *, workers: int, minutes: float, every_s: float, share: float, undisturbed_s: float, capacity_s: float, seed: int
) -> tuple[list[Row], list[Check]]:
    async with served("--devices", f"cpu:{workers}") as server:
        pictures = await load.draw_undisturbed(server, load.catalogue(NUM_PICTURES, seed))
        capacity = await load.capacity_per_s(server, pictures, capacity_s)
        rate = share * capacity
        calm = await load.run_load(server, pictures, load.poisson(pictures, rate, undisturbed_s, seed))
        before, events = await server.counters(), list[Event]()
        killing = asyncio.create_task(kill_workers(server, every_s, random.Random(seed), events))
        struck = await load.run_load(server, pictures, load.poisson(pictures, rate, 60 * minutes, seed + 1))
        killing.cancel()
        with suppress(asyncio.CancelledError):
            await killing
        came_back = await server.until_alive(workers)
        counted = since(before, await server.counters())
        again = [await load.ask_for(server, picture) for picture in pictures[:8]]
    quiet, disturbed = load.summary(calm), load.summary(struck)
    ratio = disturbed["p99_s"] / quiet["p99_s"] if quiet["p99_s"] and disturbed["p99_s"] else None
    rows: list[Row] = [
        {"phase": "undisturbed", "capacity_per_s": capacity, "rate_per_s": rate, **quiet},
        {"phase": "kills", "kills": len(events), **disturbed, "p99_ratio": ratio, "counters": counted},
        {"phase": "after", "all_workers_back": came_back, "right": again.count("right"), "of": len(again)},
        {"phase": "events", "events": events},
    ]
    checks = [
        none_of("wrong", quiet["wrong"] + disturbed["wrong"] + again.count("wrong")),
        none_of("lost", quiet["lost"] + disturbed["lost"] + again.count("lost")),
        none_of("5xx", quiet["http_5xx"] + disturbed["http_5xx"]),
        none_of("tracebacks in the server's log", server.num_tracebacks),
        Check(name="all workers back", figure=came_back, bound="within 90 s", holds=came_back),
        at_most("p99, killed / undisturbed", ratio, MOST_P99_RATIO),
    ]
    return rows, checks


def command(command_line: str, output: Path, **options: float) -> int:
    rows, checks = asyncio.run(measure(**options))  # type: ignore[arg-type]
    return finish(command_line, rows, checks, output)
