"""`python -m benchmarks.research pools`: several models on one pool of devices, beside a pool of its own for each.

In virtual time, on the same arrivals and deadlines: a model's own pool gets that model's requests. The devices divide
evenly among the pools; load and base SLOs are those of all devices, whoever has them.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tetrion.engine.planning.cost.tables import CostTables
from tetrion.engine.planning.policies.registry import get_planner
from tetrion.entrypoints.bench.outcomes import Outcome, Run
from tetrion.entrypoints.bench.simulation import SimulatedSystem
from tetrion.entrypoints.bench.slo import (
    DEFAULT_SIMULATED_DEVICES,
    NO_FILES,
    NO_WEIGHTS,
    about_profiles,
    as_input_error,
    cost_tables,
    grid,
    simulated_system,
)
from tetrion.entrypoints.bench.slo_points import Grid, Point, loads_of, models_of, points, slos_of
from tetrion.entrypoints.bench.slo_run import SloOptions
from tetrion.entrypoints.bench.slo_statistics import Row, attainment, difference, summarise
from tetrion.entrypoints.bench.workloads import Trace
from tetrion.entrypoints.record import check_writable, make_record, write_record

KEPT = ("requests", "attainment", "ci95", "attainment_by_class", "mean_s", "p95_s", "p99_s", "gpu_s_per_image")


class Pools(msgspec.Struct, frozen=True, kw_only=True):
    """A pool for each model: model -> its devices."""

    pools: dict[str, SimulatedSystem]

    def run(self, trace: Trace, policy: str, seed: int) -> Run:
        """What all of them did, as one run of `trace`."""
        outcomes: dict[int, Outcome] = {}
        runs = []
        for model, pool in self.pools.items():
            places = [place for place, request in enumerate(trace) if request.model == model]
            if places:
                run, _ = pool.run([trace[place] for place in places], policy, seed)
                runs.append(run)
                outcomes |= zip(places, run.outcomes, strict=True)
        return Run(
            outcomes=tuple(outcomes[place] for place in range(len(trace))),
            num_devices=sum(pool.num_devices for pool in self.pools.values()),
            end_s=max(run.end_s for run in runs),
            decision_s=tuple(decision_s for run in runs for decision_s in run.decision_s),
        )


def apart(shared: SimulatedSystem) -> Pools:
    """The devices of `shared`, as many for each model. Raises ValueError where that cannot be."""
    profiles = shared.tables.profiles
    each, left = divmod(shared.num_devices, len(profiles))
    if len(profiles) < 2 or left:
        raise ValueError(f"devices: {shared.num_devices} do not divide among {len(profiles)} models, or there is one")
    own = {model: CostTables(profiles={model: profile}) for model, profile in profiles.items()}
    return Pools(
        pools={model: msgspec.structs.replace(shared, tables=tables, num_devices=each) for model, tables in own.items()}
    )


def measure(point: Point, policy: str, shared: SimulatedSystem) -> tuple[list[Row], Row]:
    """A row for the one pool and one for the pools of their own, and how the first differs from the second."""
    pools = apart(shared)
    together = [shared.run(trace, policy, seed)[0] for seed, trace in point.traces]
    parted = [pools.run(trace, policy, seed) for seed, trace in point.traces]
    about = {"policy": policy, "mix": point.mix, "rate_per_min": point.rate_per_min, "slo_scale": point.slo_scale}
    each = next(iter(pools.pools.values())).num_devices
    rows = [
        {"system": f"1 × {shared.num_devices}"} | about | _figures(together),
        {"system": f"{len(pools.pools)} × {each}"} | about | _figures(parted),
    ]
    mean_s = [row["mean_s"] for row in rows]
    compared = difference(together, parted)
    return rows, about | {
        "attainment": compared and compared[0],
        "ci95": compared and compared[1],
        "by_seed": [_by_how_much([one], [other]) for one, other in zip(together, parted, strict=True)],
        "by_model": {
            model: _by_how_much([_part(run, model) for run in together], [_part(run, model) for run in parted])
            for model in pools.pools
        },
        "mean_s": None if None in mean_s else mean_s[0] / mean_s[1] - 1,
    }


def _figures(runs: Sequence[Run]) -> Row:
    row, beside = summarise(runs)
    return {name: row[name] for name in KEPT} | {"utilisation": beside["utilisation"]}


def _by_how_much(runs: Sequence[Run], others: Sequence[Run]) -> float | None:
    """Attainment of `runs` less that of `others`."""
    shares = [attainment([outcome for run in of for outcome in run.outcomes]) for of in (runs, others)]
    return None if None in shares else float(-np.diff(shares)[0])


def _part(run: Run, model: str) -> Run:
    return msgspec.structs.replace(run, outcomes=tuple(o for o in run.outcomes if o.request.model == model))


def command(
    *,
    profile: Mapping[str, Path],
    floors: Mapping[str, Path] = NO_FILES,
    share: Mapping[str, float] = NO_WEIGHTS,
    devices: int = DEFAULT_SIMULATED_DEVICES,
    policy: Sequence[str] = ("horizon",),
    output: Path | None = None,
    as_json: bool = False,
    command_line: str = "python -m benchmarks.research pools",
    **workload: Any,
) -> dict[str, Any]:
    """What the command does: run, print a line for each row and each difference (or one JSON object), write `output`.

    `profile`, `floors`, `share`: see `slo.command`; `workload`: see `slo.grid`. Raises InputError.
    """
    check_writable(output, "output")
    with as_input_error():
        for name in policy:
            get_planner(name)
        tables = cost_tables(profile, floors)
        asked = grid(models=models_of(tables, share), **workload)
        shared = simulated_system(SloOptions(grid=asked, tables=tables), devices)
        apart(shared)
        found = list(points(asked, devices, lambda: tables))
    rows: list[Row] = []
    differences: list[Row] = []
    for point in found:
        load = None if asked.traces else loads_of(point.rate_per_min or 0.0, asked, point.mix, devices, tables)
        for name in policy:
            print(f"{name}: {point.mix}, {point.rate_per_min:.3g}/min, SLO ×{point.slo_scale:g}", file=sys.stderr)
            both, compared = measure(point, name, shared)
            rows += both
            differences.append(compared | {"load": load})
    made = make_record(command_line, rows) | {
        "differences": differences,
        "workload": _about(asked, devices, tables),
        "profile": about_profiles(tables),
    }
    text = write_record(made, output)
    print(text if as_json else "\n".join([*map(_line, rows), *map(_in_words, differences)]))
    return made


def _about(asked: Grid, devices: int, tables: CostTables) -> dict[str, Any]:
    return {
        "num_steps": asked.num_steps,
        "num_requests": asked.num_requests,
        "seeds": asked.seeds,
        "base_slo_s": None if asked.traces else slos_of(asked, devices, lambda: tables),
        "models": [msgspec.structs.asdict(model) for model in asked.models],
    }


def _line(row: Row) -> str:
    return (
        f"{row['system']:8} {row['policy']:12} {row['mix']:8} {_number(row['rate_per_min'], '.3g'):>5}/min"
        f" ×{row['slo_scale']:<4g} {_number(row['attainment'], '.3f')} of {row['requests']},"
        f" mean {_number(row['mean_s'], '.2f')} s, p95 {_number(row['p95_s'], '.2f')} s"
    )


def _in_words(compared: Row) -> str:
    load = "" if compared["load"] is None else f"load {sum(compared['load'].values()):.2f}, "
    low, high = compared["ci95"] or (None, None)
    return (
        f"{load}{_number(compared['rate_per_min'], '.3g')}/min, SLO ×{compared['slo_scale']:g}, {compared['policy']}:"
        f" one pool {_points(compared['attainment'])} points ({_points(low)} … {_points(high)}),"
        f" mean latency {_number(compared['mean_s'], '+.0%')}"
    )


def _points(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:+.1f}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
