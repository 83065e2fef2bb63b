"""`python -m benchmarks.research energy-saving`: what the energy modes of `horizon` save on a trace, between two ends.

Runs every mode on the same traces, in virtual time (the real loop) or live, and puts them on a scale from what mode
`fastest` takes to what oracles would (see `oracle.py`). Joules on that scale are the profile's: measured where
the profile was measured, and as good as it. Live runs say beside them what receipts add up to.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec

from benchmarks.research import oracle as energy_oracle
from benchmarks.research.oracle import Spent
from tetrion.engine.config import EnergyMode, EngineConfig, PlannerConfig
from tetrion.engine.executors.simulated import Disturbance
from tetrion.engine.planning.cost.profile import Profile, read_profile
from tetrion.engine.planning.cost.tables import only_table
from tetrion.engine.planning.degrees import DegreeTables
from tetrion.engine.planning.energy_admission import why_not
from tetrion.engine.planning.horizon_options import HorizonOptions
from tetrion.engine.shape import cost_key_of_size
from tetrion.entrypoints.bench.live import EmbeddedSystem
from tetrion.entrypoints.bench.outcomes import Mode, Run
from tetrion.entrypoints.bench.simulation import MAX_DEVICES, simulate
from tetrion.entrypoints.bench.slo import grid
from tetrion.entrypoints.bench.slo_points import Point, points
from tetrion.entrypoints.bench.workloads import Trace
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.record import check_writable, make_record, write_record

STEP_OVERHEAD_S = 0.0003
REGROUP_S = 0.0002
HEADINGS = (
    ("mix", 10),
    ("rate", 7),
    ("SLO", 7),
    ("system", 18),
    ("px", 11),
    ("pictures", 10),
    ("attained", 10),
    ("J/picture", 11),
    ("with idle", 11),
    ("mean s", 8),
    ("metered J", 9),
)
Draw = Callable[[Trace, EnergyMode, int], tuple[Run, Mapping[int, float | None]]]
"""A trace (and its seed) in a mode, and the active joules of receipts by place in the trace."""


class SavingOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`horizon`: with `j_per_s`, `extra_j`; its mode is replaced. `idle_watts`: what a GPU draws that does nothing."""

    profile: Profile
    num_devices: int = 8
    modes: tuple[EnergyMode, ...] = ("fastest", "least-energy")
    horizon: HorizonOptions = HorizonOptions()
    idle_watts: float | None = None


def measure(
    point: Point, options: SavingOptions, draw: Draw, run_mode: Mode = "sim"
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows (system × class) and savings (mode) of one point."""
    tables = tables_for(options, {(r.width, r.height) for _, trace in point.traces for r in trace})
    drawn: dict[str, list[Spent]] = {}
    device_s = 0.0
    for seed, trace in point.traces:
        end_s = 0.0
        for mode in options.modes:
            run, metered_j = draw(trace, mode, seed)
            end_s = max(end_s, run.end_s)
            drawn.setdefault(mode, []).extend(energy_oracle.spent(run.outcomes, tables, metered_j))
        for name in energy_oracle.ORACLES:
            drawn.setdefault(name, []).extend(energy_oracle.oracle(name, trace, tables, STEP_OVERHEAD_S))
        device_s += end_s * options.num_devices
    watts = options.idle_watts
    idle = {
        name: None if watts is None else energy_oracle.idle_j(found, device_s, watts) for name, found in drawn.items()
    }
    about = {"mix": point.mix, "rate_per_min": point.rate_per_min, "slo_scale": point.slo_scale}
    rows = [
        {
            "system": name,
            "mode": run_mode if name in options.modes else "sim",
            "devices": options.num_devices,
            **about,
            "px": size,
        }
        | msgspec.structs.asdict(figures)
        for name, found in drawn.items()
        for size, figures in energy_oracle.by_class(found, idle[name]).items()
    ]
    sums = {name: energy_oracle.totals(found, idle[name]) for name, found in drawn.items()}
    best = {name: sums[name] for name in energy_oracle.ORACLES}
    savings = [
        {"system": mode, **about}
        | msgspec.structs.asdict(energy_oracle.saving(sums[mode], sums["fastest"], best))
        | {"totals": {name: msgspec.structs.asdict(sums[name]) for name in ("fastest", mode, *best)}}
        for mode in options.modes
        if mode != "fastest"
    ]
    return rows, savings


def tables_for(options: SavingOptions, sizes: set[tuple[int, int]]) -> DegreeTables:
    """Raises InputError if the profile has no joules for one of them."""
    tables = DegreeTables(only_table(options.profile), options.num_devices)
    for key in map(cost_key_of_size, sorted(sizes)):
        if reason := why_not(tables["", key], key, PlannerConfig()):
            raise InputError(f"profile: {reason}")
    return tables


def command(
    *,
    profile: Path,
    devices: int = 8,
    live: EngineConfig | None = None,
    mode: Sequence[str] = ("least-energy",),
    idle_watts: float | None = None,
    j_per_s: float = HorizonOptions().j_per_s,
    extra_j: float = HorizonOptions().extra_j,
    output: Path | None = None,
    as_json: bool = False,
    command_line: str = "python -m benchmarks.research energy-saving",
    **workload: Any,
) -> dict[str, Any]:
    """What the command does: run, print the table (or one JSON object), write `output`. `live`: on an engine that these
    start, instead of `devices` simulated ones. Raises InputError."""
    check_writable(output, "output")
    system = None if live is None else EmbeddedSystem(live)
    if system is not None:
        devices = system.num_devices
    if not 1 <= devices <= MAX_DEVICES:
        raise InputError(f"devices: must be from 1 to {MAX_DEVICES}, got {devices}")
    modes = tuple(name for name in get_args(EnergyMode) if name in ("fastest", *mode))
    try:
        horizon = msgspec.convert({"j_per_s": j_per_s, "extra_j": extra_j}, HorizonOptions)
        options = SavingOptions(
            profile=read_profile(profile), num_devices=devices, modes=modes, horizon=horizon, idle_watts=idle_watts
        )
        found = list(points(grid(**workload), devices, lambda: only_table(options.profile)))
    except OSError as error:
        field = "profile" if str(error.filename) == str(profile) else "trace"
        raise InputError(f"{field}: cannot read {str(error.filename)!r}: {error.strerror}") from None
    except (ValueError, msgspec.ValidationError) as error:
        raise InputError(str(error)) from None
    rows: list[dict[str, Any]] = []
    savings: list[dict[str, Any]] = []
    about: dict[str, Any] = {"savings": savings, "joules": _source(options.profile), "idle_watts": idle_watts}
    draw: Draw = functools.partial(_simulate, options)
    with contextlib.ExitStack() as running:
        if system is not None:
            running.enter_context(system)
            system.warm_up(sorted({(r.width, r.height) for point in found for _, trace in point.traces for r in trace}))
            draw = functools.partial(_live, system)
        for point in found:
            about_it = f"{point.mix}, {point.rate_per_min} per minute, SLO ×{point.slo_scale:g}"
            print(about_it, file=sys.stderr, flush=True)
            measured = measure(point, options, draw, "sim" if system is None else system.mode)
            for kept, new in zip((rows, savings), measured, strict=True):
                kept += new
        if system is not None:
            about["ledger"] = system.ledger
    made = make_record(command_line, rows) | about
    text = write_record(made, output)
    print(text if as_json else table(rows, savings, made["joules"]))
    return made


def table(rows: Sequence[dict[str, Any]], savings: Sequence[dict[str, Any]], source: str) -> str:
    """The rows and savings as text for people."""
    lines = ["".join(f"{name:<{width}}" for name, width in HEADINGS)]
    for row in rows:
        cells = (
            row["mix"],
            _number(row["rate_per_min"], ".3g"),
            f"×{row['slo_scale']:g}",
            row["system"],
            row["px"],
            str(row["requests"]),
            _number(row["attainment"], ".3f"),
            _number(row["joules_per_image"], ".0f"),
            _number(row["with_idle_j"], ".0f"),
            _number(row["mean_s"], ".2f"),
            _number(row["metered_j_per_image"], ".0f"),
        )
        lines.append("".join(f"{cell:<{width}}" for cell, (_, width) in zip(cells, HEADINGS, strict=True)).rstrip())
    return "\n".join([*lines, *map(_in_words, savings), f"joules but for metered ones: {source}"])


def _in_words(saving: dict[str, Any]) -> str:
    shares = " and ".join(
        f"{_number(share, '.1%')} of the {saving['possible_j'][name]:.0f} J of {name}"
        for name, share in saving["realised"].items()
    )
    metered = "" if saving["metered_saved_j"] is None else f" ({saving['metered_saved_j']:.0f} J by receipts)"
    return (
        f"{saving['mix']}, {_number(saving['rate_per_min'], '.3g')} per minute, SLO ×{saving['slo_scale']:g}:"
        f" {saving['system']} saves {saving['saved_j']:.0f} J{metered}, {shares},"
        f" at an attainment {_number(saving['lower_by_points'], '.2f')} points lower than fastest"
    )


def _live(system: EmbeddedSystem, trace: Trace, mode: EnergyMode, seed: int) -> tuple[Run, Mapping[int, float | None]]:
    system.energy_mode = mode
    run, _ = system.run(trace, PlannerConfig().policy, seed)
    return run, {number: receipt.active_j for number, receipt in system.receipts.items()}


def _simulate(
    options: SavingOptions, trace: Trace, mode: EnergyMode, seed: int
) -> tuple[Run, Mapping[int, float | None]]:
    run = simulate(
        trace,
        profile=options.profile,
        policy=PlannerConfig().policy,
        num_devices=options.num_devices,
        duration=Disturbance(seed=seed, step_overhead_s=STEP_OVERHEAD_S, regroup_s=REGROUP_S),
        planner_config=PlannerConfig(options=msgspec.structs.replace(options.horizon, energy=mode)),
    )
    return run, {}


def _source(profile: Profile) -> str:
    """Where the joules come from, as far as the profile says."""
    said = profile.meta.get("step_j_source") or "of a table that does not say how it was measured"
    return f"{said}; {profile.model or 'unnamed model'}, {profile.gpu or 'unnamed GPU'}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
