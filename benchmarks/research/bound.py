"""`python -m benchmarks.research bound`: the clairvoyant bound (see `clairvoyant.py`) for the points of a grid."""

import sys
import time
from pathlib import Path
from typing import Any

from tetrion.engine.planning.cost.profile import read_profile
from tetrion.engine.planning.cost.tables import only_table
from tetrion.entrypoints.bench.clairvoyant import DEFAULT_BLOCK, DEFAULT_TIME_LIMIT_S, Bound, attainment_bound
from tetrion.entrypoints.bench.slo import grid
from tetrion.entrypoints.bench.slo_points import Point, models_of, points
from tetrion.entrypoints.bench.slo_statistics import Row
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.record import check_writable, make_record, write_record


def command(
    *,
    profile: Path,
    devices: int = 8,
    step_overhead_ms: float = 0.0,
    block: int = DEFAULT_BLOCK,
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
    output: Path | None = None,
    as_json: bool = False,
    command_line: str = "python -m benchmarks.research bound",
    **workload: Any,
) -> dict[str, Any]:
    """What `python -m benchmarks.research bound` does: print a line for each point (or one JSON object), write
    `output`.

    `workload`: see `slo.grid`. Raises InputError for what the caller can put right.
    """
    check_writable(output, "output")
    try:
        tables = only_table(read_profile(profile))
        todo = list(points(grid(models=models_of(tables, {}), **workload), devices, lambda: tables))
    except ValueError as error:
        raise InputError(str(error)) from None
    rows = []
    for point in todo:
        start_s = time.perf_counter()
        bounds = [
            attainment_bound(
                trace, tables, devices, step_overhead_s=step_overhead_ms / 1e3, block=block, time_limit_s=time_limit_s
            )
            for _, trace in point.traces
        ]
        rows.append(_row(point, devices, bounds) | {"seconds": time.perf_counter() - start_s})
        print(_line(rows[-1]), file=sys.stderr if as_json else sys.stdout, flush=True)
    made = make_record(command_line, rows)
    text = write_record(made, output)
    if as_json:
        print(text)
    return made


def _row(point: Point, devices: int, bounds: list[Bound]) -> Row:
    """`num_met` of `num_with_slo` requests at most; `gap`: how many of these the search left open."""
    num_met, num_with_slo = sum(bound.num_met for bound in bounds), sum(bound.num_with_slo for bound in bounds)
    return {
        "devices": devices,
        "mix": point.mix,
        "rate_per_min": point.rate_per_min,
        "slo_scale": point.slo_scale,
        "requests": sum(len(trace) for _, trace in point.traces),
        "num_with_slo": num_with_slo,
        "num_met": num_met,
        "bound": num_met / num_with_slo if num_with_slo else None,
        "gap": sum(bound.gap for bound in bounds),
    }


def _line(row: Row) -> str:
    rate = "all at once" if row["rate_per_min"] is None else f"{row['rate_per_min']:.3g}/min"
    bound = "no deadlines" if row["bound"] is None else f"at most {row['bound']:.4f} ({row['num_met']} requests)"
    left_open = f", search ended {row['gap']} short of proving it" if row["gap"] else ""
    return f"{row['mix']:12} {rate:>12}  SLO ×{row['slo_scale']:<5g} {bound}{left_open}  [{row['seconds']:.1f} s]"
