"""Several times the load that can be sustained, with a deadline on every request: how many are met, is everybody
answered?

A server with its defaults; with `--baseline` in the same run one of another checkout under `admission=reject-hopeless`,
which takes the same arrivals: for each load one after the other, `--rounds` times, in turns of who is first, while the
other one is idle. The rate is a multiple of what the servers sustain, which is measured at the start.
"""

import asyncio
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.soak.load import Answer, capacity_per_s, catalogue, draw_undisturbed, poisson, run_load, summary
from benchmarks.soak.report import Check, Row, finish, none_of
from benchmarks.soak.server import Server, served
from tetrion.entrypoints.errors import InputError

PACKAGE = ("configs", "engine", "entrypoints", "kernels")
SIZES = ((128, 128), (192, 192), (256, 256))
NUM_PICTURES, MAX_STEPS = 24, 3
HERE, THERE = "defaults", "baseline"
ADMISSION = ("--planner", "admission=reject-hopeless")


@contextmanager
def importable(folder: Path) -> Iterator[str]:
    """A path from which `tetrion` is that of the checkout `folder`. Raises InputError if it is none."""
    if missing := [name for name in PACKAGE if not (folder / name).is_dir()]:
        raise InputError(f"baseline: {folder} is no checkout, it has no {missing[0]}")
    with tempfile.TemporaryDirectory() as path:
        (Path(path) / "tetrion").mkdir()
        for name in PACKAGE:
            (Path(path) / "tetrion" / name).symlink_to((folder / name).resolve())
        yield path


def row_of(who: str, factor: float, rate: float, slo_ms: float, answers: Sequence[Answer]) -> Row:
    """`met`: right pictures within the deadline, by the client's clock, from when they were due. `late`: pictures after
    it. `unanswered`: without any answer, or with one that is no answer's."""
    counts = summary(answers)
    pictures = [answer for answer in answers if answer.outcome == "right"]
    met = sum(answer.latency_s <= slo_ms / 1e3 for answer in pictures)
    return {
        "server": who,
        "load": factor,
        "rate_per_s": round(rate, 2),
        "sent": len(answers),
        "met": met,
        "met_share": round(met / max(1, len(answers)), 4),
        "late": len(pictures) - met,
        "refused": sum(count for outcome, count in counts["others"].items() if outcome.startswith("429")),
        "timed_out": counts["others"].get("503 queue_timeout", 0),
        "wrong": counts["wrong"],
        "unanswered": counts["lost"],
        "others": {name: n for name, n in counts["others"].items() if not name.startswith(("429", "503 queue"))},
        "p99_s": counts["p99_s"] and round(counts["p99_s"], 2),
        "max_s": counts["max_s"] and round(counts["max_s"], 2),
    }


def total(rows: Sequence[Row], who: str, factor: float, name: str) -> int:
    return sum(row[name] for row in rows if (row["server"], row["load"]) == (who, factor))


def checks_of(rows: Sequence[Row], factors: Sequence[float], has_baseline: bool) -> Iterator[Check]:
    own = [row for row in rows if row["server"] == HERE]
    yield none_of("wrong", sum(row["wrong"] for row in own))
    yield none_of("admitted and not answered", sum(row["unanswered"] for row in own))
    yield none_of("other errors", sum(sum(row["others"].values()) for row in own))
    for factor in factors if has_baseline else ():
        figures = {
            who: total(rows, who, factor, "met") / max(1, total(rows, who, factor, "sent")) for who in (HERE, THERE)
        }
        yield Check(
            name=f"share of deadlines met at × {factor:g}",
            figure=figures[HERE],
            bound=f"at least {figures[THERE]:.3g}, the baseline's",
            holds=figures[HERE] >= figures[THERE],
        )


async def measure(
    *,
    load: Sequence[float],
    seconds: float,
    slo_ms: float,
    rounds: int,
    workers: int,
    capacity_s: float,
    seed: int,
    baseline: Path | None,
) -> tuple[list[Row], list[Check]]:
    devices = ("--devices", f"cpu:{workers}")
    async with AsyncExitStack() as stack:
        servers: dict[str, Server] = {}
        if baseline is not None:
            path = os.pathsep.join(
                [stack.enter_context(importable(baseline)), *filter(None, [os.environ.get("PYTHONPATH")])]
            )
            servers[THERE] = await stack.enter_async_context(
                served(*devices, *ADMISSION, environment={"PYTHONPATH": path})
            )
        servers[HERE] = await stack.enter_async_context(served(*devices))
        bodies = catalogue(NUM_PICTURES, seed, MAX_STEPS, SIZES)
        known = {who: await draw_undisturbed(server, bodies) for who, server in servers.items()}
        rates = [await capacity_per_s(servers[who], known[who], capacity_s) for who in servers]
        rate, rows = sum(rates) / len(rates), list[Row]()
        for number in range(rounds):
            for factor in load:
                for who in list(servers)[:: 1 if number % 2 == 0 else -1]:
                    arrivals = poisson(known[who], factor * rate, seconds, seed + number)
                    answers = await run_load(servers[who], known[who], arrivals, slo_ms=slo_ms)
                    rows.append(row_of(who, factor, factor * rate, slo_ms, answers))
    checks = [*checks_of(rows, load, baseline is not None)]
    return rows, [*checks, none_of("tracebacks in the server's log", servers[HERE].num_tracebacks)]


def command(command_line: str, output: Path, **options: Any) -> int:
    rows, checks = asyncio.run(measure(**options))
    return finish(command_line, rows, checks, output)
