"""The commands around deadlines: options of `tetrion bench slo`, `timeline` and `plot`.

Imports little but click at module level, so that `--help` is quick.
"""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tetrion.entrypoints.errors import report_errors
from tetrion.entrypoints.number_range import NumberRange
from tetrion.entrypoints.options import some_engine_options, take_config

FILE = click.Path(path_type=Path)
POSITIVE = click.IntRange(min=1)
Command = Callable[..., Any]

WORKLOAD_OPTIONS = (
    click.option("--trace", metavar="FILE", type=FILE, multiple=True, help="Arrivals, JSON lines; may be repeated."),
    click.option("--mix", metavar="NAME", multiple=True, help="Without a trace: uniform (default), skewed."),
    click.option(
        "--rate",
        type=float,
        multiple=True,
        help="Without a trace: arrivals per minute. Default: 12, which saturates a few CPUs.",
    ),
    click.option(
        "--load",
        type=float,
        multiple=True,
        help="Instead of a rate: arrivals × narrowest work / devices; 1 is all that devices can do.",
    ),
    click.option("--slo-scale", type=float, multiple=True, help="Factor on all SLOs. Default: 1."),
    click.option("--seed", type=int, multiple=True, help="Without a trace: seed of the arrivals. Default: 11, 12, 13."),
    click.option("--num-requests", type=POSITIVE, help="Without a trace: requests of each. Default: 700."),
    click.option("--num-steps", type=POSITIVE, help="Without a trace: denoising steps. Default: 28."),
    click.option("--size", metavar="WxH", multiple=True, help="Without a trace: sizes. Default: the published four."),
    click.option("--base-slo", metavar="S", type=float, multiple=True, help="Seconds for each --size, in their order."),
    click.option(
        "--calibrate-slo", is_flag=True, help="Fit base SLOs: largest size alone, at the widest degree = SLO / 1.1."
    ),
    click.option(
        "--arrivals",
        type=click.Choice(["poisson", "gamma", "diurnal", "production"]),
        help="Default: poisson. production: sessions as a commercial service had them.",
    ),
    click.option(
        "--burstiness",
        type=NumberRange(0, 100, min_open=True),
        help="Of gamma arrivals: standard deviation over mean of what lies between two. Default: 2.",
    ),
    click.option("--slo-share", type=NumberRange(0, 1), help="Share of the requests that state an SLO. Default: 1."),
    click.option(
        "--step-share", metavar="STEPS=N", multiple=True, help="Instead of --num-steps: requests of so many steps."
    ),
    click.option("--tenant", metavar="NAME", help="Of all requests but those beside."),
    click.option(
        "--beside",
        metavar="KEY=VALUE,…",
        multiple=True,
        help="Further requests, all alike: size, rate (a minute) or number, steps, slo (s), weight, tenant.",
    ),
    click.option("--tiers", is_flag=True, help="70 % interactive, 30 % batch (SLO ×10, weight 0.25)."),
    click.option("--first", type=POSITIVE, metavar="N", help="Only the first N requests of each trace."),
    click.option(
        "--compress", type=POSITIVE, metavar="N", help="Arrival times, steps and what SLOs leave for denoising ÷ N."
    ),
)
SIMULATION_OPTIONS = (
    click.option("--noise", type=float, help="Simulated: standard deviation of the log of every duration."),
    click.option("--bias", type=float, help="Simulated: 0.05 makes everything 5 % slower than the profile."),
    click.option("--step-overhead-ms", type=float, help="Simulated: added to each step. Default: 0.3."),
    click.option("--regroup-ms", type=float, help="Simulated: added when members change. Default: 0.2."),
    click.option("--lose", metavar="S:DEVICE", multiple=True, help="Simulated: this device dies after S seconds."),
    click.option(
        "--max-inflight", type=click.IntRange(1, 4096), help="Simulated: requests the policy sees. Default: 4096."
    ),
)
PLANNER_OPTIONS = (some_engine_options("planner"),)
ENGINE_OPTIONS = (some_engine_options("models", "load_format", "num_threads", "roles"),)
"""Of the engine that runs live."""
LIVE = ("model", "load_format", "num_threads", "roles")
TABLE_OPTIONS = (
    click.option(
        "--profile",
        metavar="[MODEL=]FILE",
        multiple=True,
        help="Cost table, JSON; simulated: one for each model. Live: the engine's own by default.",
    ),
    click.option(
        "--floors",
        metavar="[MODEL=]FILE",
        multiple=True,
        help="Simulated: extend the profile's degrees by these floors.",
    ),
    click.option(
        "--share",
        metavar="MODEL=N",
        multiple=True,
        help="Simulated: requests of this model, in proportion. Default: 1.",
    ),
)
SIMULATION = ("noise", "bias", "step_overhead_ms", "regroup_ms", "lose", "max_inflight")
RESULT_OPTIONS = (
    click.option("--output", metavar="FILE", type=FILE, help="Write the result there as JSON."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
)


def with_options(*groups: tuple[Command, ...]) -> Callable[[Command], Command]:
    def add(command: Command) -> Command:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return add


@click.command("slo")
@click.option("--simulate", is_flag=True, help="In virtual time on --profile.")
@click.option("--live", is_flag=True, help="On an engine in this process.")
@click.option("--url", metavar="URL", help="On the server at URL, under its own policy; --policy names it in the rows.")
@with_options(TABLE_OPTIONS)
@click.option("--devices", metavar="N|LIST", help="Simulated: how many (default 8). Live: as for generate, e.g. cpu:2.")
@click.option("--policy", metavar="NAME", multiple=True, help="Planner; may be repeated. Default: horizon.")
@with_options(WORKLOAD_OPTIONS)
@click.option(
    "--bound",
    is_flag=True,
    help="Compute the clairvoyant bound of every point too (see python -m benchmarks.research bound).",
)
@click.option("--record", metavar="FILE", type=FILE, help="Write every run there, for replay and timeline.")
@click.option("--plots", metavar="DIR", type=FILE, help="Draw attainment against SLO scale and rate into DIR.")
@with_options(SIMULATION_OPTIONS, PLANNER_OPTIONS, ENGINE_OPTIONS, RESULT_OPTIONS)
def slo(**options: Any) -> int:
    """Attainment of deadlines and latency of planners on the same arrivals, simulated or live.

    Live, loads and fitted SLOs follow from what the devices could do when the engine started: on CPUs that other
    programs use meanwhile they do less, and deadlines are missed for that alone.
    """

    def run() -> int:
        from tetrion.engine.roles import AUTO
        from tetrion.entrypoints.bench.slo import command

        given = given_options(options)
        given["command_line"] = spell("slo", given)
        given |= by_model(given)
        devices = given.pop("devices", None)
        live = LIVE if options["simulate"] or options["url"] else (*LIVE, "planner")
        engine = take_config({name: given.pop(name) for name in live if name in given} | {"devices": devices})
        simulation = {name: given.pop(name) for name in SIMULATION if name in given}
        if options["simulate"] and devices is not None:
            given["devices"] = number_of_devices(devices)
        if options["simulate"] and engine.roles != AUTO:
            simulation["roles"] = engine.roles
        command(engine=engine, simulation=simulation, **given)
        return 0

    return report_errors(run)


@click.command("timeline")
@click.argument("recordings", metavar="RECORD", type=FILE)
@click.option("--run", "number", type=POSITIVE, default=1, show_default=True, help="Which run of the file.")
@click.option("--from", "from_s", type=click.FloatRange(min=0), help="Seconds. Default: the first request.")
@click.option("--to", "to_s", type=click.FloatRange(min=0), help="Seconds. Default: 20 s later.")
@click.option("--png", metavar="FILE", type=FILE, help="Draw GPUs × time there (needs matplotlib).")
@click.option("--chrome-trace", metavar="FILE", type=FILE, help="Write all of it for chrome://tracing or Perfetto.")
def timeline(**options: Any) -> int:
    """What every device did when, of a run recorded with `tetrion bench slo --record RECORD`."""

    def run() -> int:
        from tetrion.entrypoints.bench.timeline import command

        command(**given_options(options))
        return 0

    return report_errors(run)


@click.command("plot")
@click.argument("results", metavar="RESULT.json...", type=FILE, nargs=-1, required=True)
@click.option("--output", metavar="DIR", type=FILE, default=Path("plots"), show_default=True)
def plot(results: tuple[Path, ...], output: Path) -> int:
    """Draw attainment against SLO scale and rate from results of `tetrion bench slo` (needs matplotlib)."""

    def run() -> int:
        from tetrion.entrypoints.bench.attainment_plots import command

        command(results, output)
        return 0

    return report_errors(run)


COMMANDS = (slo, timeline, plot)


def spell(name: str, given: dict[str, Any], program: str = "tetrion bench") -> str:
    """The command line that says what `given` does."""
    words = [*program.split(), name]
    for option, value in given.items():
        flag = {"as_json": "--json", "time_limit_s": "--time-limit"}.get(option, f"--{option.replace('_', '-')}")
        if option in ("recordings",):
            words.append(str(value))
        elif value is True:
            words.append(flag)
        else:
            words += [word for item in (value if isinstance(value, tuple) else (value,)) for word in (flag, str(item))]
    return shlex.join(words)


def given_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given; commands have the defaults."""
    return {name: value for name, value in options.items() if value is not None and value is not False and value != ()}


def by_model(given: dict[str, Any]) -> dict[str, Any]:
    """Those of `TABLE_OPTIONS` that are given, by the models that they name. Raises InputError."""
    from tetrion.entrypoints.arguments import parse_files, parse_weights

    parsers = {"profile": parse_files, "floors": parse_files, "share": parse_weights}
    return {name: parse(given[name], name) for name, parse in parsers.items() if name in given}


def number_of_devices(text: str) -> int:
    from tetrion.entrypoints.errors import InputError

    if not text.isdecimal():
        raise InputError(f"devices: a simulation needs their number, got {text!r}")
    return int(text)
