"""The command line `python -m benchmarks.research`. Imports little but click, so that `--help` is quick."""

from pathlib import Path
from typing import Any

import click

from tetrion.entrypoints import cli
from tetrion.entrypoints.bench.slo_commands import (
    ENGINE_OPTIONS,
    FILE,
    LIVE,
    POSITIVE,
    RESULT_OPTIONS,
    TABLE_OPTIONS,
    WORKLOAD_OPTIONS,
    by_model,
    given_options,
    number_of_devices,
    spell,
    with_options,
)
from tetrion.entrypoints.errors import report_errors
from tetrion.entrypoints.number_range import NumberRange


@click.command("ring")
@click.option("--num-round-trips", type=click.IntRange(min=1), default=2000, show_default=True, help="Back to back.")
@click.option(
    "--num-after-silence", type=click.IntRange(min=1), default=500, show_default=True, help="After 5 ms each."
)
@click.option("--output", metavar="FILE", type=click.Path(path_type=Path), help="Write the result there as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def ring(**options: Any) -> int:
    """The time from engine to worker and back for a command that does nothing."""

    def run() -> int:
        from benchmarks.research.ring import command

        command(**options)
        return 0

    return report_errors(run)


PROGRAM = "python -m benchmarks.research"
PRICE = NumberRange(0, 1_000_000_000, min_open=True)


@click.command("energy-saving")
@click.option("--profile", metavar="FILE", type=FILE, required=True, help="Cost table with joules (step_j), JSON.")
@click.option("--live", is_flag=True, help="On an engine in this process, which runs on that table.")
@click.option("--devices", metavar="N|LIST", help="Simulated: how many (default 8). Live: as for generate, e.g. cpu:2.")
@click.option(
    "--mode",
    type=click.Choice(["balanced", "least-energy"]),
    multiple=True,
    default=("least-energy",),
    show_default=True,
    help="Beside fastest; may be repeated.",
)
@click.option("--idle-watts", type=NumberRange(0, 100_000), help="Of an idle GPU, for totals. Default: not counted.")
@click.option("--j-per-s", type=PRICE, help="balanced: what a second earlier may cost. Default: the planner's.")
@click.option(
    "--extra-j", type=NumberRange(0, 10), help="least-energy: the share that widening may cost. Default: the planner's."
)
@with_options(WORKLOAD_OPTIONS, ENGINE_OPTIONS, RESULT_OPTIONS)
def energy_saving(**options: Any) -> int:
    """What energy modes save, simulated or live, between mode fastest and oracles that know no other request."""

    def run() -> int:
        from benchmarks.research.saving import command
        from tetrion.entrypoints.errors import InputError
        from tetrion.entrypoints.options import take_config

        given = {name: value for name, value in options.items() if value not in (None, False, ())}
        command_line = spell("energy-saving", given, PROGRAM)
        is_live, devices = given.pop("live", False), given.pop("devices", None)
        engine = {name: given.pop(name) for name in LIVE if name in given}
        if is_live:
            planner = tuple(f"{name}={given[name]}" for name in ("j_per_s", "extra_j") if name in given)
            profile = (str(given["profile"]),)
            given["live"] = take_config({"devices": devices, "profile": profile, "planner": planner, **engine})
        elif engine:
            raise InputError(f"{next(iter(engine))}: is for --live")
        elif devices is not None:
            given["devices"] = number_of_devices(devices)
        command(command_line=command_line, **given)
        return 0

    return report_errors(run)


@click.command("bound")
@click.option("--profile", metavar="FILE", type=FILE, required=True, help="Cost table, JSON.")
@click.option("--devices", type=POSITIVE, default=8, show_default=True, help="How many.")
@with_options(WORKLOAD_OPTIONS)
@click.option("--step-overhead-ms", type=float, default=0.0, show_default=True, help="Added to each step.")
@click.option("--block", type=POSITIVE, help="Requests solved together; more is tighter and slower. Default: 150.")
@click.option("--time-limit", "time_limit_s", type=float, metavar="S", help="For each block. Default: 60.")
@with_options(RESULT_OPTIONS)
def bound(**options: Any) -> int:
    """What share of the deadlines of a trace anybody could have met: a clairvoyant upper bound (needs scipy)."""

    def run() -> int:
        from benchmarks.research.bound import command

        given = given_options(options)
        command(command_line=spell("bound", given, PROGRAM), **given)
        return 0

    return report_errors(run)


@click.command("floors")
@click.option("--model", metavar="PATH", required=True, help="Whose floors. Its configuration suffices.")
@click.option("--measured", metavar="FILE", type=FILE, required=True, help="Record of tetrion bench step, with floors.")
@click.option("--degrees", metavar="1,2,…", default="1,2,3,4,5,6,7,8", show_default=True)
@click.option("--sizes", metavar="WxH,…", help="Default: the published four, as far as the model draws them.")
@click.option("--output", metavar="FILE", type=FILE, help="Write the floors there as JSON.")
def floors(**options: Any) -> int:
    """Library floors of a step, modelled with rates of measured ones, for --floors of tetrion bench slo."""

    def run() -> int:
        from benchmarks.research.floors import command
        from tetrion.entrypoints.arguments import parse_degrees

        given = given_options(options)
        command_line = spell("floors", given, PROGRAM)
        degrees = sorted(set(parse_degrees(given.pop("degrees"), "degrees")))
        command(command_line=command_line, degrees=degrees, **given)
        return 0

    return report_errors(run)


@click.command("pools")
@click.option("--devices", type=POSITIVE, help="All of them. Default: 8.")
@click.option("--policy", metavar="NAME", multiple=True, help="Planner; may be repeated. Default: horizon.")
@with_options(TABLE_OPTIONS, WORKLOAD_OPTIONS, RESULT_OPTIONS)
def pools(**options: Any) -> int:
    """Several models (--profile MODEL=FILE each) on one pool of simulated devices, beside a pool for each."""

    def run() -> int:
        from benchmarks.research.pools import command
        from tetrion.entrypoints.errors import InputError

        given = given_options(options)
        command_line = spell("pools", given, PROGRAM)
        if "profile" not in given:
            raise InputError("profile: each model needs its cost table (--profile MODEL=FILE)")
        command(command_line=command_line, **given | by_model(given))
        return 0

    return report_errors(run)


@click.command("replay")
@click.argument("recordings", metavar="RECORD", type=FILE)
@click.option("--profile", metavar="FILE", type=FILE, help="Cost table. Default: the times measured in the run itself.")
@click.option("--drift", is_flag=True, help="Simulated devices slow down when those of the recorded run did.")
@click.option(
    "--seeds",
    type=POSITIVE,
    default=1,
    show_default=True,
    help="Above 1: so many runs on times drawn from the recorded ones; means and ranges.",
)
@with_options(RESULT_OPTIONS)
def replay(**options: Any) -> int:
    """Simulate what `tetrion bench slo --record RECORD` recorded, and say how well it agrees."""

    def run() -> int:
        from benchmarks.research.replay import command

        given = given_options(options)
        command(command_line=spell("replay", given, PROGRAM), **given)
        return 0

    return report_errors(run)


@click.command("late")
@click.option(
    "--folder", metavar="DIR", type=FILE, default=Path("out/late"), show_default=True, help="Runs are kept there."
)
@click.option("--policy", metavar="NAME[:KEY=VALUE…]", multiple=True, help="In place of the usual; NAME@COMMIT too.")
@click.option("--also", metavar="NAME[:KEY=VALUE…]", multiple=True, help="Besides the usual, at the mixes.")
@click.option("--only", metavar="GROUP", multiple=True, help="Only points of this group; may be repeated.")
@click.option("--quick", is_flag=True, help="700 requests a run in place of 2,100.")
@click.option("--jobs", type=click.IntRange(1, 64), help="Processes at a time. Default: 1.")
@click.option("--budget-s", type=NumberRange(0, None), help="Begin no run after so many seconds.")
@click.option("--plots", metavar="DIR", type=FILE, help="Draw the frontier, and ratios by load, into DIR.")
@click.option("--output", metavar="FILE", type=FILE, help="Write the result there as JSON.")
def late(**options: Any) -> int:
    """Attainment and lateness of policies at mixes, bursts, tenants and giants, simulated, beside what is asked.

    The same command again goes on with what is missing."""

    def run() -> int:
        from benchmarks.research.late.command import command

        given = given_options(options)
        command(command_line=spell("late", given, PROGRAM), **given)
        return 0

    return report_errors(run)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def research() -> None:
    """Questions about planning and costs that were asked once, and may be asked again."""


for command in (ring, bound, floors, pools, replay, energy_saving, late):
    research.add_command(command)


def run(arguments: list[str]) -> int:
    """Run the command line `arguments` and return its exit code."""
    return cli.run(arguments, program=research, name=PROGRAM)
