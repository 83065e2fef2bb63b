"""Numbered cases of odd input to the command line, run in this process up to the start of an engine, and what came of
each. Case `number` of a seed is the same again in every run and alone.
"""

import contextlib
import io
import json
import random
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from tetrion.engine.api import AsyncEngine
from tetrion.engine.executors.fleet.segments import Segments
from tetrion.entrypoints import cli

HANG_S, STOP_S = 2.0, 20.0
"""Longer than that is a hang; it is ended after so long, if anything in it can be ended."""
SHOWN = 20
Case = Callable[[random.Random], tuple[str, Sequence[str]]]
"""Draws a case: what it is, for people, and the arguments of `tetrion`."""


class Started(Exception):
    """Everything was accepted: workers would be started now."""


class Stopped(Exception):
    """The case took too long."""


class CheckedEngine(AsyncEngine):
    """Goes as far as memory that is shared with workers, and starts none."""

    async def start(self) -> None:
        Segments(self.devices, tuple(self.models.specs.values()), self.config).close()
        raise Started


def outcome_of(arguments: Sequence[str]) -> tuple[str, str]:
    """What `tetrion ARGUMENTS` came to (`accepted`, `exit 2`, `traceback`, …), and what it said of that on stderr."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), _stopped_after(STOP_S):
            code = cli.run(list(arguments), CheckedEngine)
    except Started:
        return "accepted", said.getvalue()
    except Stopped:
        return "stopped", said.getvalue()
    except BaseException:
        return "traceback", traceback.format_exc()
    if code not in (0, 1, 2, 130):
        return f"exit {code}, which is not documented", said.getvalue()
    text = said.getvalue()
    if code == 2 and not _is_told_well(text):
        return "exit 2, badly told", text
    return f"exit {code}", text


def _is_told_well(text: str) -> bool:
    """One line of ours behind what is worth knowing, or click's with its usage before it; and nothing that a terminal
    would obey."""
    lines = text.splitlines()
    is_ours = bool(lines) and lines[-1].startswith("tetrion: error: ") and "error" not in "".join(lines[:-1])
    is_usage = bool(lines) and lines[0].startswith("Usage:") and "Error: " in text
    return (is_ours or is_usage) and all(line.isprintable() for line in lines)


@contextlib.contextmanager
def _stopped_after(limit_s: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Stopped

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_cases(case: Case, count: int, seed: int, first: int, allowed: Sequence[str]) -> dict[str, Any]:
    """Counts by outcome, the slowest case, growth of memory, and the first `SHOWN` faults: cases whose outcome is not
    `allowed`, and those of more than `HANG_S`."""
    outcomes: Counter[str] = Counter()
    faults: list[dict[str, Any]] = []
    slowest_s, before_kb = 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(first, first + count):
        what, arguments = case(random.Random(f"{seed}/{number}"))
        begun_s = time.monotonic()
        outcome, said = outcome_of(arguments)
        took_s = time.monotonic() - begun_s
        slowest_s = max(slowest_s, took_s)
        outcomes[outcome] += 1
        if outcome not in allowed or took_s > HANG_S:
            faults.append(
                {"number": number, "what": what, "outcome": outcome, "seconds": round(took_s, 2), "said": said[-1500:]}
            )
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb
    return {
        "count": count,
        "seed": seed,
        "first": first,
        "outcomes": dict(outcomes.most_common()),
        "num_faults": len(faults),
        "slowest_s": round(slowest_s, 3),
        "peak_grown_mb": round(grown_kb / 1024, 1),
        "faults": faults[:SHOWN],
    }


def case_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--first", type=click.IntRange(min=0), default=0, show_default=True, help="Of the cases."),
        click.option("--seed", type=int, default=1, show_default=True),
        click.option("--count", type=click.IntRange(min=1), default=500, show_default=True),
    ):
        command = option(command)
    return command


def finish(result: dict[str, Any]) -> None:
    """Print the result as JSON, and exit with 1 if there are faults."""
    print(json.dumps(result, indent=1))
    sys.exit(1 if result["num_faults"] else 0)
