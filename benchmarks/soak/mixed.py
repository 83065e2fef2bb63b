"""Load of all kinds with faults of all kinds, for as long as you like: does anything grow, is anything wrong?

Beside pictures that are compared come clients that hang up, bad bodies, scrapes of /metrics, killed and stopped
workers. What engine, fork server and workers hold is sampled meanwhile. (No picture is fetched by URL: those are kept
for an hour, which would look like a leak.)
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import httpx
import msgspec

from benchmarks.soak import load
from benchmarks.soak.faults import Event, around, kill_workers, stop_workers
from benchmarks.soak.mutation import body_case
from benchmarks.soak.processes import Figures, add_up, shared_memory_mb
from benchmarks.soak.report import Check, Row, finish, none_of
from benchmarks.soak.server import Server, served, since
from benchmarks.soak.slopes import slope_of

NUM_PICTURES = 24
LIMITS = ("--max-steps", "4")
"""A damaged body that is good after all costs as much as others."""
STOP_S = (0.05, 5.0)
HANG_UP_EVERY_S, BAD_BODY_EVERY_S, SCRAPE_EVERY_S = 5.0, 1.0, 2.0
MOST_SAMPLES_S, FEWEST_SAMPLES = 5.0, 240
TOLERANCE = {"private_mb": 5.0, "shared_mb": 5.0, "descriptors": 2.0, "threads": 2.0}
"""Growth that counts as none: in an hour, or in the run if it is shorter."""

MACHINE = "machine"
"""Whose shared memory others use, too: told, not judged."""

Sample = tuple[float, dict[str, list[Figures]], float]
"""Seconds, what processes hold by role, the machine's shared memory in MB."""


async def every(seconds: float, rng: random.Random, act: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(around(seconds, rng))
        await act()


class Strangers:
    """Clients that do what good ones do not; `outcomes` counts what they got."""

    def __init__(self, server: Server, pictures: Sequence[load.Picture], seed: int) -> None:
        self._server, self._pictures, self._seed = server, pictures, seed
        self._rng = random.Random(seed)
        self._num_bad = 0
        self.outcomes: Counter[str] = Counter()

    async def hang_up(self) -> None:
        """In the middle of a request."""
        body = self._rng.choice(self._pictures).body
        try:
            async with asyncio.timeout(self._rng.uniform(0, 0.5)):
                await self._server.http.post(load.GENERATIONS, json=body)
        except TimeoutError:
            self.outcomes["hung up"] += 1
        except httpx.HTTPError:
            self.outcomes["lost"] += 1

    async def bad_body(self) -> None:
        self._num_bad += 1
        case = body_case(self._rng.choice(self._pictures).body, self._seed, self._num_bad)
        await self._note("bad body", self._server.http.post(load.GENERATIONS, content=case.body, headers=case.headers))

    async def scrape(self) -> None:
        await self._note("scrape", self._server.http.get("/metrics"))

    async def _note(self, kind: str, asking: Awaitable[httpx.Response]) -> None:
        try:
            self.outcomes[f"{kind} {(await asking).status_code}"] += 1
        except httpx.HTTPError:
            self.outcomes["lost"] += 1


async def sample(server: Server, period_s: float, samples: list[Sample]) -> None:
    begun_s = time.monotonic()
    while True:
        held = await asyncio.to_thread(server.family.figures)
        samples.append((time.monotonic() - begun_s, held, shared_memory_mb()))
        await asyncio.sleep(period_s)


def slopes_of(samples: Sequence[Sample], workers: int) -> list[Row]:
    """One for each figure of each role, and the machine's shared memory. Samples in which a process is missing do not
    count for its role."""
    rows: list[Row] = []
    for role, number in (("engine", 1), ("fork server", 1), ("worker", workers)):
        whole = [(at_s, add_up(held[role])) for at_s, held, _ in samples if len(held.get(role, ())) == number]
        for name in Figures.__struct_fields__:
            rows.append(_row(role, name, [(at_s, getattr(sum_of, name)) for at_s, sum_of in whole]))
    rows.append(_row(MACHINE, "shared_mb", [(at_s, shared) for at_s, _, shared in samples]))
    return rows


def _row(of: str, figure: str, series: Sequence[tuple[float, float]]) -> Row:
    slope = slope_of([at_s for at_s, _ in series], [value for _, value in series], TOLERANCE[figure])
    row: Row = {"of": of, "figure": figure, "samples": len(series), "verdict": "too short"}
    return row | (msgspec.structs.asdict(slope) if slope else {})


async def measure(
    *,
    workers: int,
    minutes: float,
    kill_every_s: float,
    stop_every_s: float,
    share: float,
    capacity_s: float,
    seed: int,
) -> tuple[list[Row], list[Check]]:
    rngs = [random.Random(f"{seed}:{number}") for number in range(5)]
    async with served("--devices", f"cpu:{workers}", *LIMITS) as server:
        pictures = await load.draw_undisturbed(server, load.catalogue(NUM_PICTURES, seed))
        capacity = await load.capacity_per_s(server, pictures, capacity_s)
        strangers, kills, stops = Strangers(server, pictures, seed), list[Event](), list[Event]()
        before, samples = await server.counters(), list[Sample]()
        beside = [
            kill_workers(server, kill_every_s, rngs[0], kills),
            stop_workers(server, *STOP_S, stop_every_s, rngs[1], stops),
            every(HANG_UP_EVERY_S, rngs[2], strangers.hang_up),
            every(BAD_BODY_EVERY_S, rngs[3], strangers.bad_body),
            every(SCRAPE_EVERY_S, rngs[4], strangers.scrape),
            sample(server, min(MOST_SAMPLES_S, 60 * minutes / FEWEST_SAMPLES), samples),
        ]
        tasks = [asyncio.create_task(work) for work in beside]
        answers = await load.run_load(server, pictures, load.poisson(pictures, share * capacity, 60 * minutes, seed))
        died = [repr(task.exception()) for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        came_back = await server.until_alive(workers)
        counted = since(before, await server.counters())
        again = [await load.ask_for(server, picture) for picture in pictures]
    told, slopes = load.summary(answers), slopes_of(samples, workers)
    strange = strangers.outcomes
    rows: list[Row] = [
        {"phase": "mixed", "capacity_per_s": capacity, **told, "kills": len(kills), "stops": len(stops)},
        {"phase": "strangers", "outcomes": dict(strange), "counters": counted, "ended_early": died},
        {"phase": "after", "right": again.count("right"), "of": len(again)},
        *slopes,
    ]
    num_5xx = told["http_5xx"] + sum(count for outcome, count in strange.items() if outcome[-3:-2] == "5")
    checks = [
        none_of("wrong", told["wrong"] + again.count("wrong")),
        none_of("lost", told["lost"] + again.count("lost") + strange["lost"]),
        none_of("5xx", num_5xx),
        none_of("tracebacks in the server's log", server.num_tracebacks),
        none_of("faults that ended early", len(died)),
        Check(name="all workers back", figure=came_back, bound="within 90 s", holds=came_back),
        none_of("figures that grow", sum(row["verdict"] == "grows" for row in slopes if row["of"] != MACHINE)),
    ]
    return rows, checks


def command(command_line: str, output: Path, **options: float) -> int:
    rows, checks = asyncio.run(measure(**options))  # type: ignore[arg-type]
    return finish(command_line, rows, checks, output)
