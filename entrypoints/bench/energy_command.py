"""The options of `tetrion bench energy`. Imports nothing but click at module level, so that `--help` is quick."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tetrion.entrypoints.errors import report_errors
from tetrion.entrypoints.number_range import NumberRange
from tetrion.entrypoints.options import command_line

LONGEST_S = 3600
BUDGET = NumberRange(0, 1_000_000, min_open=True)
FILE = click.Path(path_type=Path)


def energy_command(engine_options: Callable[..., Any], take: Callable[..., Any]) -> click.Command:
    """The command, given the options that all engines have, and what takes those out."""

    @click.command("energy")
    @click.option("--sizes", metavar="WxH,…", help="Default: 512² and 1024², as far as the model draws them.")
    @click.option("--steps", metavar="N,N,…", help="Denoising steps. Default: the model's.")
    @click.option("--degrees", metavar="N,N,…", help="Default: all that the devices allow.")
    @click.option("--window-s", type=NumberRange(5, LONGEST_S), default=5.0, show_default=True, help="Shortest window.")
    @click.option("--cool-s", type=NumberRange(0, LONGEST_S), default=2.0, show_default=True, help="Pause before each.")
    @click.option("--target", type=NumberRange(0.001, 1), default=0.02, show_default=True, help="95 % half-width.")
    @click.option("--budget-s", type=BUDGET, default=3600.0, show_default=True, help="No window is begun after that.")
    @click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of order and arrivals.")
    @click.option(
        "--rate", type=NumberRange(0.001, 1_000_000), help="Open loop in place of the sweep: arrivals per minute."
    )
    @click.option("--arrivals", type=click.Choice(["poisson", "gamma", "diurnal"]), default="poisson")
    @click.option("--num-requests", type=click.IntRange(min=10), default=200, show_default=True, help="Open loop.")
    @click.option("--trace", metavar="FILE", type=FILE, help="Open loop with the arrivals of a trace.")
    @click.option("--windows", type=click.Choice(["meter", "zeus"]), default="meter", help="What measures windows.")
    @click.option("--export", "export_folder", metavar="DIR", type=FILE, help="Also in the layout of ML.ENERGY v3.")
    @click.option("--dry-run", is_flag=True, help="Only print the plan and how long it takes.")
    @click.option("--output", metavar="FILE", type=FILE, help="Write the result there as JSON.")
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
    @engine_options
    @click.pass_context
    def energy(ctx: click.Context, **options: Any) -> int:
        """Joules a picture: a sweep over sizes, steps and degrees, or arrivals in an open loop.

        Windows of at least 5 s in random order with pauses, repeated until the 95 % interval is narrow. All GPUs count,
        idle ones too. --output is written after every round. Without a meter joules are null, with the reason.
        """
        return report_errors(lambda: _run(take(options), command_line(ctx), **options))

    return energy


def _run(
    engine: Any,
    command_line: str,
    *,
    sizes: str | None,
    steps: str | None,
    degrees: str | None,
    rate: float | None,
    arrivals: str,
    num_requests: int,
    trace: Path | None,
    seed: int,
    window_s: float,
    cool_s: float,
    target: float,
    budget_s: float,
    **kept: Any,
) -> int:
    from tetrion.engine.planning.energy_mode import PATIENT_SLACK_S
    from tetrion.engine.resolve import MAX_STEPS
    from tetrion.entrypoints.arguments import parse_degrees
    from tetrion.entrypoints.bench.energy import command
    from tetrion.entrypoints.bench.energy_points import SweepOptions
    from tetrion.entrypoints.bench.workloads import Workload, make_trace, read_trace
    from tetrion.entrypoints.errors import InputError
    from tetrion.entrypoints.profile import checked_degrees, checked_sizes
    from tetrion.entrypoints.session import open_engine

    opened = open_engine(engine)
    num_steps = parse_degrees(steps, "steps") if steps else (opened.spec.num_steps,)
    if unfit := [number for number in num_steps if not 1 <= number <= MAX_STEPS]:
        raise InputError(f"steps: must be from 1 to {MAX_STEPS}, got {unfit[0]}")
    options = SweepOptions(
        sizes=checked_sizes(opened.spec, sizes, ((512, 512), (1024, 1024))),
        num_steps=num_steps,
        degrees=checked_degrees(opened.spec, len(opened.devices), degrees),
        window_s=window_s,
        cool_s=cool_s,
        target=target,
        budget_s=budget_s,
        seed=seed,
    )
    arriving = None
    try:
        if trace is not None:
            arriving = read_trace(trace)
        elif rate is not None:
            workload = Workload(
                rate_per_min=rate,
                num_requests=num_requests,
                base_slo_s=(PATIENT_SLACK_S / 2,) * len(options.sizes),  # long, but not so long that they wait
                sizes=options.sizes,
                num_steps=options.num_steps[0],
                arrivals=arrivals,  # type: ignore[arg-type]
            )
            arriving = make_trace(workload, seed)
    except OSError as error:
        raise InputError(f"trace: cannot read {str(trace)!r}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(str(error)) from None
    return command(engine, options, trace=arriving, command_line=command_line, **kept)
