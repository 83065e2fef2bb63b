"""Simulated attainment of policies at the points of a yardstick file, beside the values it records or the bound.

    python -m benchmarks.workloads.compare_policies --seeds 11 12 13 --output OUT.json
    python -m benchmarks.workloads.compare_policies --seeds 21 --scales --bound 150 --output OUT.json

The file (`planner_points.json`, made when the planner was designed) holds `profile`, `overheads`, `trace`, `points`.
Every policy sees the same traces. With `--bound N` only the first N requests of each trace count, and beside
attainment stands what a clairvoyant scheduler could reach at most, at the points below saturation. `--budget-s` ends
the run early; the same command again goes on with what is missing from OUT.json.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from tetrion.engine.planning.cost.profile import Profile
from tetrion.engine.planning.cost.tables import only_table
from tetrion.entrypoints.bench.compression import load_of
from tetrion.entrypoints.bench.simulation import SimulatedSystem
from tetrion.entrypoints.bench.slo_points import Grid
from tetrion.entrypoints.bench.slo_run import SloOptions, run
from tetrion.entrypoints.bench.workloads import SIZES, class_shares
from tetrion.entrypoints.record import commit, make_record, write_record

Row = dict[str, Any]
TABLE = (
    (8, "uniform", 12.0, 1.0),
    (8, "uniform", 12.0, 1.5),
    (8, "uniform", 24.0, 1.2),
    (8, "uniform", 36.0, 1.2),
    (8, "uniform", 60.0, 1.2),
    (8, "skewed", 12.0, 1.2),
    (8, "skewed", 24.0, 1.2),
    (4, "uniform", 12.0, 1.2),
    (4, "uniform", 20.0, 1.2),
)
"""Devices, mix, requests per minute, SLO scale: the rows of the design's table."""
RECORDED_NAMES = {"tetriserve": "tetriserve-g5"}
FIELDS = ("devices", "mix", "rate_per_min", "slo_scale")


def key_of(point: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(point[field] for field in FIELDS)


def chosen(data: dict[str, Any], scales: Sequence[float], bound: int | None) -> list[dict[str, Any]]:
    """The points to run: those of the table and those at `scales` (none: all), the table's first; for the bound
    those below saturation."""
    points = [p for p in data["points"] if not scales or p["slo_scale"] in scales or key_of(p) in TABLE]
    points.sort(key=lambda point: key_of(point) not in TABLE)
    return [p for p in points if bound is None or load(data, p) < 1]


def load(data: dict[str, Any], point: dict[str, Any]) -> float:
    """Share of the devices' time that the point's arrivals take at the narrowest degree; 1 is saturation."""
    shares = class_shares(point["mix"])
    num_steps = data["trace"]["num_steps"]
    return load_of(point["rate_per_min"], profile_of(data), SIZES, shares.tolist(), num_steps, point["devices"])


def profile_of(data: dict[str, Any]) -> Profile:
    return msgspec.convert(data["profile"], Profile, strict=False)


def measure(
    data: dict[str, Any], point: dict[str, Any], policies: Sequence[str], seeds: Sequence[int], bound: int | None
) -> list[Row]:
    """A row of `tetrion bench slo` for each policy, with the point's load and what the file records for it."""
    grid = Grid(
        mixes=(point["mix"],),
        rates_per_min=(point["rate_per_min"],),
        slo_scales=(point["slo_scale"],),
        seeds=tuple(seeds),
        num_requests=data["trace"]["num_requests"],
        num_steps=data["trace"]["num_steps"],
        base_slo_s=tuple(data["trace"]["base_slo_s"][str(point["devices"])]),
        first=bound,
    )
    system = SimulatedSystem(
        tables=only_table(profile_of(data)),
        num_devices=point["devices"],
        step_overhead_s=data["overheads"]["dispatch_ms_per_step"] / 1e3,
        regroup_s=data["overheads"]["regroup_ms"] / 1e3,
    )
    options = SloOptions(grid=grid, policies=tuple(policies), bound=bound is not None, bound_time_limit_s=10.0)
    return [_row(data, point, seeds, row, bound) for row in run(options, system).rows]


def _row(data: dict[str, Any], point: dict[str, Any], seeds: Sequence[int], row: Row, bound: int | None) -> Row:
    recorded = point["attainment"].get(RECORDED_NAMES.get(row["policy"], row["policy"]))
    compared = {"to_bound": row["bound"] - row["attainment"]} if bound else {}
    if not bound and recorded is not None:
        compared = {"recorded": recorded, "difference": row["attainment"] - recorded}
    kept = ("policy", *FIELDS, "requests", "attainment", "ci95", "attainment_by_class", "bound")
    return {name: row[name] for name in kept} | {"seeds": list(seeds), "load": load(data, point)} | compared


def summary(rows: Sequence[Row]) -> dict[str, Row]:
    """Of each policy: mean distance to the bound, or mean and extremes of the difference from what is recorded."""
    found = {}
    for policy in dict.fromkeys(row["policy"] for row in rows):
        of_policy = [row for row in rows if row["policy"] == policy]
        for name in ("to_bound", "difference"):
            values = [row[name] for row in of_policy if name in row]
            if values:
                about = {"points": len(values), "mean": statistics.fmean(values), "min": min(values)}
                found[policy] = {"of": name, **about, "max": max(values)}
    return found


def _done(path: Path | None, seeds: Sequence[int], bound: int | None) -> list[Row]:
    """Rows that an earlier run of the same command left, made by the same commit."""
    if path is None or not path.is_file():
        return []
    earlier = json.loads(path.read_text())
    same = earlier["commit"] == commit()
    return [r for r in earlier["rows"] if same and r["seeds"] == list(seeds) and ("to_bound" in r) == bool(bound)]


def _text(row: Row) -> str:
    point = f"{row['devices']} {row['mix']:8} {row['rate_per_min']:4g}/min ×{row['slo_scale']:<4g}"
    words = [f"{point} load {row['load']:.2f}  {row['policy']:22} {row['attainment']:.4f}"]
    if "to_bound" in row:
        words.append(f"bound {row['bound']:.4f}, {100 * row['to_bound']:.2f} points above")
    elif "recorded" in row:
        words.append(f"recorded {row['recorded']:.4f}, {100 * row['difference']:+.2f} points")
    return "  ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", type=Path, nargs="?", default=Path(__file__).parent / "planner_points.json")
    parser.add_argument("--policies", nargs="+", default=["horizon"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[21, 22, 23])
    parser.add_argument("--scales", nargs="*", type=float, default=[1.2], help="Without a value: all of the file.")
    parser.add_argument("--bound", type=int, metavar="N", help="Compare with the bound on the first N requests.")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="Start no point after so many seconds.")
    parser.add_argument("--output", type=Path, help="Write the rows there as JSON.")
    given = parser.parse_args()
    data, end_s = json.loads(given.points.read_text()), time.monotonic() + given.budget_s
    rows = _done(given.output, given.seeds, given.bound)
    known = {(row["policy"], *key_of(row)) for row in rows}
    for point in chosen(data, given.scales, given.bound):
        missing = [policy for policy in given.policies if (policy, *key_of(point)) not in known]
        if missing and time.monotonic() < end_s:
            rows += (new := measure(data, point, missing, given.seeds, given.bound))
            print("\n".join(map(_text, new)), flush=True)
    print(json.dumps(summary(rows), indent=1))
    command = f"python -m benchmarks.workloads.compare_policies {shlex.join(sys.argv[1:])}"
    write_record(make_record(command, rows) | {"summary": summary(rows)}, given.output)


if __name__ == "__main__":
    main()
