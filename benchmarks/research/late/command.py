"""What `python -m benchmarks.research late` does: run what is missing, then judge, write and draw what there is."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.research.late.criteria import by_load, criteria, p99_ratio
from benchmarks.research.late.figures import COLUMNS, PARTS, Row, figures
from benchmarks.research.late.plots import draw
from benchmarks.research.late.points import GIANT, NUM_REQUESTS, QUICK_REQUESTS, SEEDS, Point, points
from benchmarks.research.late.runs import ROOT, Contender, Runs, parse_contender
from tetrion.engine.planning.cost.profile import ClassCost, Profile
from tetrion.entrypoints.bench.slo import cost_tables
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.plotting import import_matplotlib
from tetrion.entrypoints.record import check_writable, make_record, write_whole

PROFILE = ROOT / "configs/profiles/nvidia-h200-flux1-dev.json"
FLOORS = ROOT / "benchmarks/workloads/h100_floors.json"
OURS, BEFORE = "horizon", "horizon@c151ae8"
POLICIES = (OURS, "edf", "tetriserve-continuous", "edf-best-fit", BEFORE)


def command(
    *,
    folder: Path,
    policy: Sequence[str] = POLICIES,
    also: Sequence[str] = (),
    only: Sequence[str] = (),
    quick: bool = False,
    jobs: int = 1,
    budget_s: float = math.inf,
    output: Path | None = None,
    plots: Path | None = None,
    command_line: str = "python -m benchmarks.research late",
) -> dict[str, Any]:
    """`policy`, `also`: see `parse_contender`; the latter run at the mixes only. `only`: these groups of points.
    `quick`: a third of the requests. Raises InputError."""
    check_writable(output, "output")
    if plots is not None:
        import_matplotlib()
    contenders = [parse_contender(text) for text in dict.fromkeys(policy)]
    variants = [parse_contender(text) for text in dict.fromkeys(also) if text not in policy]
    profile = table()
    asked = points(profile, QUICK_REQUESTS if quick else NUM_REQUESTS)
    groups = {point.group for point in asked}
    if unknown := set(only) - groups:
        raise InputError(f"only: expected one of {', '.join(sorted(groups))}, got {min(unknown)!r}")
    asked = tuple(point for point in asked if not only or point.group in only)
    runs = Runs(folder, profile)
    tasks = [(contender, point) for point in asked for contender in contenders]
    tasks += [(variant, point) for point in asked for variant in variants if point.group == "mixes"]
    is_complete = runs.complete(tasks, SEEDS, jobs=jobs, budget_s=budget_s, report=_to_stderr)
    contenders += variants
    found = {point.name: _rows(runs, contenders, point) for point in asked}
    judged = criteria(found, asked, OURS, BEFORE)
    loads = list(by_load(found, asked, [contender.name for contender in contenders]))
    made = make_record(command_line, _flat(asked, found)) | {
        "columns": COLUMNS,
        "criteria": judged,
        "by_load": loads,
        "seeds": SEEDS,
        "requests": QUICK_REQUESTS if quick else NUM_REQUESTS,
        "complete": is_complete,
        "profile": profile.meta,
        "code": {contender.name: contender.code for contender in contenders},
    }
    if output is not None:
        write_whole(output, json.dumps(made, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
    print("\n".join([*map(_load_line, loads), "", *map(_criterion_line, judged)]))
    if plots is not None:
        tenants = {point.name: found[point.name] for point in asked if point.group == "tenants" and found[point.name]}
        print("\n".join(map(str, draw(loads, tenants, OURS, plots))))
    if not is_complete:
        print("not complete: the same command goes on", file=sys.stderr)
    return made


def table() -> Profile:
    """FLUX.1-dev on H200s: degrees 1 to 4 measured, 6 and 8 by floors, 4096² estimated; both marked in `meta`."""
    profile = cost_tables({"": PROFILE}, {"": FLOORS}).profiles[""]
    key = f"{GIANT[0]}x{GIANT[1]}"
    cost = profile.cost(key)
    step_ms = {degree: 1e3 * step_s for degree, step_s in cost.step_by_degree_s.items()}
    estimated = ClassCost.of(step_ms, {stage: 1e3 * seconds for stage, seconds in cost.aux_s.items()}, {}, {})
    with_giant = profile.with_classes({key: estimated})
    return msgspec.structs.replace(with_giant, meta={**profile.meta, "estimated": [key]})


def _rows(runs: Runs, contenders: Sequence[Contender], point: Point) -> dict[str, Row]:
    """Policy -> figures, of those whose runs are all there."""
    traces = [point.trace(seed) for seed in SEEDS]
    found = {}
    for contender in contenders:
        done = [run for seed in SEEDS if (run := runs.read(contender, point, seed)) is not None]
        if len(done) == len(SEEDS):
            found[contender.name] = figures(traces, done)
    return found


def _flat(asked: Sequence[Point], found: dict[str, dict[str, Row]]) -> list[Row]:
    """A row for each point and policy: figures in the order of `COLUMNS`, of all requests and of each part."""
    rows = []
    for point in asked:
        for policy, row in found[point.name].items():
            ratio = p99_ratio(found[point.name], policy)
            made = {"group": point.group, "point": point.name, "policy": policy, "all": _columns(row)}
            made["p99_ratio"] = None if ratio is None else float(f"{ratio:.3g}")
            made |= {name: row[name] for name in ("by_seed", "cpu_s", "plan_ms")}
            for part in PARTS:
                if of_part := row.get(f"by_{part}"):
                    made[f"by_{part}"] = {name: _columns(figures) for name, figures in of_part.items()}
            rows.append(made)
    return rows


def _columns(row: Row) -> list[float | None]:
    return [row[name] for name in COLUMNS]


def _load_line(row: Row) -> str:
    ratio = "–" if row["p99_ratio"] is None else f"{row['p99_ratio']:.2f}"
    return (
        f"load {row['load']:<4g} {row['policy']:30} met {row['met']:6.2f} %  p99 {row['p99_s']:7.2f} s"
        f"  mean {row['mean_s']:6.2f} s  p99 ratio {ratio}  ({row['points']} points)"
    )


def _criterion_line(row: Row) -> str:
    verdict = {True: "reached", False: "NOT reached", None: "not known"}[row["reached"]]
    more = "".join(f", {name} {row[name]}" for name in row.keys() - {"asked", "found", "reached"} if row[name])
    return f"{verdict:12} {row['asked']}: {row['found']}{more}"


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
