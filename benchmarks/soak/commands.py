"""The command line `python -m benchmarks.soak`. Imports little but click, so that `--help` is quick.

A command of its own has a line in `COMMANDS` and, if `all` is to run it, one in `everything.py`.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tetrion.entrypoints import cli
from tetrion.entrypoints.bench.slo_commands import given_options, spell
from tetrion.entrypoints.errors import report_errors
from tetrion.entrypoints.number_range import NumberRange

PROGRAM = "python -m benchmarks.soak"
OUTPUT = Path("out/soak")

COUNT, MANY = click.IntRange(min=0), click.IntRange(min=1)
TIME = NumberRange(0, 86_400, min_open=True)


def option(name: str, kind: Any, default: Any, says: str) -> Callable[..., Any]:
    return click.option(name, type=kind, default=default, show_default=True, help=says)


WORKERS = "CPU workers of the server."
SHARE = option("--share", NumberRange(0, 10, min_open=True), 0.8, "Of the measured capacity, that is asked for.")
HALF = option("--share", NumberRange(0, 10, min_open=True), 0.5, "Of the measured capacity, that is asked for.")
CAPACITY = option("--capacity-s", TIME, 25.0, "How long capacity is measured.")
SEED = option("--seed", int, 1, "Of pictures, arrivals and faults.")


def soak_command(module: str, function: str, name: str, *options: Callable[..., Any]) -> Callable[..., click.Command]:
    """A command that calls `MODULE.FUNCTION(command_line, output, **options)`, which returns the exit code. The
    decorated function lends its docstring."""

    def decorate(described: Callable[..., Any]) -> click.Command:
        def run(output: Path | None, **given: Any) -> int:
            def work() -> int:
                from tetrion.entrypoints.record import check_writable

                file = output or OUTPUT / f"{name}.json"
                check_writable(file, "output")
                measured = getattr(importlib.import_module(module), function)
                return int(measured(spell(name, given_options(given), PROGRAM), file, **given))

            return report_errors(work)

        command: Any = run
        output = click.option(
            "--output",
            metavar="FILE",
            type=click.Path(path_type=Path),
            help=f"Where the result goes, as JSON. Default: {OUTPUT}/{name}.json.",
        )
        for one in reversed((*options, output)):
            command = one(command)
        return click.command(name, help=described.__doc__)(command)

    return decorate


@soak_command(
    "benchmarks.soak.chaos",
    "command",
    "chaos",
    option("--minutes", TIME, 10.0, "With kills."),
    option("--every-s", TIME, 10.0, "Time between kills, ± 20 %."),
    option("--undisturbed-s", TIME, 60.0, "Before them."),
    option("--workers", MANY, 4, WORKERS),
    SHARE,
    CAPACITY,
    SEED,
)
def chaos() -> None:
    """Kill random workers under load; p99 beside that of an undisturbed phase before it."""


@soak_command(
    "benchmarks.soak.stops",
    "command_one",
    "stop",
    option("--stopped-s", TIME, 30.0, "How long the worker stands still."),
    option("--tail-s", TIME, 20.0, "Of the load, after that."),
    option("--workers", MANY, 3, WORKERS),
    HALF,
    CAPACITY,
    SEED,
)
def stop() -> None:
    """Stop one worker for a while; each request is compared with itself in an undisturbed run."""


@soak_command(
    "benchmarks.soak.stops",
    "command_many",
    "stops",
    option("--minutes", TIME, 5.0, "With stops."),
    option("--shortest-s", TIME, 0.05, "Of the stops."),
    option("--longest-s", TIME, 5.0, "Of the stops."),
    option("--every-s", TIME, 3.0, "Time between them, ± 20 %."),
    option("--workers", MANY, 3, WORKERS),
    HALF,
    CAPACITY,
    SEED,
)
def stops() -> None:
    """Stop random workers for short times at random moments; every picture is compared."""


@soak_command(
    "benchmarks.soak.resume",
    "command",
    "resume",
    option("--steps", MANY, 40, "Of each picture."),
    option("--kill-at", MANY, 30, "Steps that are done when a worker is killed."),
    option("--repeats", MANY, 3, "Losses at each degree."),
    click.option("--degree", type=click.IntRange(1, 3), multiple=True, default=(1, 2, 3), show_default=True),
)
def resume() -> None:
    """Kill a member of a picture's group near its end; how many steps are drawn again?"""


@soak_command(
    "benchmarks.soak.hogs",
    "command",
    "hogs",
    option("--hogs", COUNT, 7, "Bodies of n 10, 512², 1,000 steps, from another tenant."),
    option("--pictures", MANY, 10, "Small ones, without and again with a deadline."),
    option("--timeout-s", TIME, 40.0, "After which one counts as not answered, and no more are asked for."),
    option("--workers", MANY, 2, WORKERS),
)
def hogs() -> None:
    """Small pictures beside requests of another tenant that would take hours."""


@soak_command(
    "benchmarks.soak.overload",
    "command",
    "overload",
    click.option(
        "--load",
        type=NumberRange(0, 1000, min_open=True),
        multiple=True,
        default=(3.0, 10.0),
        show_default=True,
        help="Times the measured capacity; may be repeated.",
    ),
    option("--seconds", TIME, 60.0, "Of each load."),
    option("--slo-ms", NumberRange(0, 3.6e6, min_open=True), 4000.0, "Deadline of every request."),
    option("--rounds", MANY, 1, "How often all of it is done."),
    option("--workers", MANY, 2, WORKERS),
    CAPACITY,
    SEED,
    click.option(
        "--baseline",
        metavar="FOLDER",
        type=click.Path(path_type=Path),
        help="A checkout whose server takes the same load, under admission=reject-hopeless.",
    ),
)
def overload() -> None:
    """Far more requests with a deadline than can be served: who is in time, is everybody answered?"""


@soak_command(
    "benchmarks.soak.connections",
    "command",
    "connections",
    option("--silent", COUNT, 1500, "Connections that say nothing."),
    option("--slow-heads", COUNT, 300, "Heads of a byte a second."),
    option("--slow-bodies", COUNT, 300, "Bodies of a byte a second."),
    option("--seconds", TIME, 90.0, "By then all of these must be closed."),
    option("--waiting", COUNT, 5000, "Big bodies at once."),
    option("--body-kb", click.IntRange(1, 1024), 1023, "Of each of them."),
    option("--max-waiting-mb", click.IntRange(4, 1 << 20), 256, "The server's."),
    option("--workers", MANY, 2, WORKERS),
)
def connections() -> None:
    """`/health` beside silent and slow connections; memory of bodies that wait."""


@soak_command(
    "benchmarks.soak.fuzz",
    "command",
    "fuzz",
    option("--bodies", COUNT, 100_000, "Damaged bodies."),
    option("--streams", COUNT, 10_000, "Damaged HTTP."),
    option("--lines", COUNT, 10_000, "Damaged lines of one `tetrion batch`."),
    option("--first", COUNT, 0, "Number of the first case."),
    option("--seed", int, 1, "Of all cases."),
)
def fuzz() -> None:
    """Odd input of three kinds: no 5xx, no hang, no traceback."""


@soak_command(
    "benchmarks.soak.mixed",
    "command",
    "mixed",
    option("--minutes", TIME, 60.0, "Of load."),
    option("--kill-every-s", TIME, 60.0, "Time between kills, ± 20 %."),
    option("--stop-every-s", TIME, 30.0, "Time between stops, ± 20 %."),
    option("--workers", MANY, 3, WORKERS),
    HALF,
    CAPACITY,
    SEED,
)
def mixed() -> None:
    """Mixed load with faults of all kinds: does anything grow?"""


@click.command("all")
@option("--minutes", NumberRange(2, 86_400), 10.0, "About so long in all.")
@click.option("--output", "folder", metavar="DIR", type=click.Path(path_type=Path), default=OUTPUT, show_default=True)
def everything(minutes: float, folder: Path) -> int:
    """All of them, each in a process of its own, in about the time given."""

    def run() -> int:
        from benchmarks.soak.everything import run_all

        return run_all(minutes, folder)

    return report_errors(run)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def soak() -> None:
    """Faults and odd input against a server of its own; exit code 1 if one of the checks fails."""


COMMANDS = (chaos, stop, stops, resume, hogs, overload, connections, fuzz, mixed, everything)
for command in COMMANDS:
    soak.add_command(command)


def run(arguments: list[str]) -> int:
    """Run the command line `arguments` and return its exit code."""
    return cli.run(arguments, program=soak, name=PROGRAM)
