"""From a grid of workloads and some system to rows: every point under every policy, the bound, the recordings.

Knows systems only through `System`; prints nothing, writes no file.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from tetrion.engine.planning.cost.tables import CostTables
from tetrion.entrypoints.bench.clairvoyant import DEFAULT_TIME_LIMIT_S, attainment_bound
from tetrion.entrypoints.bench.outcomes import Chunk, Mode, Run
from tetrion.entrypoints.bench.recording import Recording
from tetrion.entrypoints.bench.simulation import SimulatedSystem
from tetrion.entrypoints.bench.slo_points import Grid, Point, points, slos_of
from tetrion.entrypoints.bench.slo_statistics import Row, difference, metered_joules, predicted_joules, summarise
from tetrion.entrypoints.bench.workloads import Trace
from tetrion.entrypoints.errors import InputError

Report = Callable[[str], None]


class System(Protocol):
    """Something that runs traces: simulated devices, an engine, a server."""

    @property
    def mode(self) -> Mode: ...

    @property
    def num_devices(self) -> int: ...

    def run(self, trace: Trace, policy: str, seed: int) -> tuple[Run, tuple[Chunk, ...]]: ...


class SloOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to run and what to keep of it. `tables`: the cost tables that SLOs, compression and bound are computed with;
    None: the system's own. `bound`: compute it too. `keep_chunks`: return recordings (of one model)."""

    grid: Grid
    policies: tuple[str, ...] = ("horizon",)
    tables: CostTables | None = None
    bound: bool = False
    bound_time_limit_s: float = DEFAULT_TIME_LIMIT_S
    keep_chunks: bool = False


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """Rows (a fixed set of fields, unknown ones None) and their diagnostics, in one order. `base_slo_s`: of each class
    before scaling and compression, None for trace files."""

    rows: list[Row] = []
    diagnostics: list[Row] = []
    recordings: list[Recording] = []
    base_slo_s: dict[str, float] | None = None


def run(
    options: SloOptions,
    system: System,
    report: Report = lambda _: None,
    save: Callable[["Results"], object] = lambda _: None,
) -> Results:
    """Every point under every policy; `save` is given the results so far after each row. Raises ValueError for a
    workload that is not possible."""
    grid, tables = options.grid, functools.cache(lambda: tables_of(system, options))
    workloads = list(points(grid, system.num_devices, tables))
    slos_s = None if grid.traces else slos_of(grid, system.num_devices, tables)
    results = Results(rows=[], diagnostics=[], recordings=[], base_slo_s=slos_s)
    run_points(options, workloads, system, results, report, save)
    return results


def run_points(
    options: SloOptions,
    workloads: Sequence[Point],
    system: System,
    results: Results,
    report: Report = lambda _: None,
    save: Callable[[Results], object] = lambda _: None,
) -> None:
    """As `run`, on workloads that are at hand (the grid of `options` is not looked at), added to `results`."""
    for point in workloads:
        bound = _bound(options, system, point, report)
        first: list[Run] = []
        for policy in options.policies:
            report(f"{policy}: {point.mix}, {_rate_text(point.rate_per_min)}, SLO ×{point.slo_scale:g}")
            ran = [system.run(trace, policy, seed) for seed, trace in point.traces]
            runs = [done for done, _ in ran]
            first = first or runs
            row, beside = _row(system, point, policy, runs, bound)
            results.rows.append(row)
            results.diagnostics.append(beside | _beside_first(options.policies[0], runs, first))
            if options.keep_chunks:
                for (seed, _), (done, chunks) in zip(point.traces, ran, strict=True):
                    results.recordings.append(_recording(system, point, policy, seed, done, chunks))
            save(results)


def tables_of(system: System, options: SloOptions | None = None) -> CostTables:
    """The cost tables that `options` name, else those that the system runs with. Raises InputError if neither are
    known."""
    tables = (options.tables if options else None) or getattr(system, "tables", None)
    if tables is None:
        raise InputError("profile: needed, since a server over HTTP does not tell its own (--profile)")
    return tables


def _row(system: System, point: Point, policy: str, runs: list[Run], bound: float | None) -> tuple[Row, Row]:
    measured, beside = summarise(runs)
    joules = predicted_joules(runs, system.tables) if isinstance(system, SimulatedSystem) else metered_joules(runs)
    row = {
        "policy": policy,
        "mode": system.mode,
        "devices": system.num_devices,
        "mix": point.mix,
        "rate_per_min": point.rate_per_min,
        "slo_scale": point.slo_scale,
        **measured,
        "joules_per_image": joules,
        "bound": bound,
    }
    about = {"policy": policy, "mix": point.mix, "seeds": [seed for seed, _ in point.traces]}
    attained = measured["attainment"]
    share = attained / bound if bound and attained is not None else None
    return row, about | beside | {"share_of_the_possible": share, "notes": _notes(system, row)}


def _notes(system: System, row: Row) -> dict[str, str]:
    """Why a field is None, or what it leaves out."""
    notes = {}
    simulated = system.mode == "sim"
    if row["joules_per_image"] is not None:
        predicted = "denoising steps only, predicted from the profile's step_j"
        notes["joules_per_image"] = predicted if simulated else "by receipts: active and share of idle"
    elif simulated:
        notes["joules_per_image"] = "the profile has no step_j for every size and degree that was used"
    else:
        notes["joules_per_image"] = "not metered"
    if row["gpu_s_per_image"] is None:
        notes["gpu_s_per_image"] = "the server does not say"
    if row["bound"] is not None and not simulated:
        notes["bound"] = "with the profile's times; real ones vary around them"
    return notes


def _beside_first(policy: str, runs: list[Run], first: list[Run]) -> Row:
    """How a policy's attainment differs from the first one's, request by request."""
    compared = None if runs is first else difference(runs, first)
    return {
        "difference": None if compared is None else {"to": policy, "attainment": compared[0], "ci95": compared[1]},
    }


def _bound(options: SloOptions, system: System, point: Point, report: Report) -> float | None:
    """The clairvoyant bound over all traces of a point, with the system's own deviations from the profile."""
    if not options.bound:
        return None
    report(f"bound: {point.mix}, {_rate_text(point.rate_per_min)}, SLO ×{point.slo_scale:g}")
    bounds = [
        attainment_bound(
            trace,
            tables_of(system, options),
            system.num_devices,
            scale=1 + system.bias if isinstance(system, SimulatedSystem) else 1.0,
            step_overhead_s=system.step_overhead_s if isinstance(system, SimulatedSystem) else 0.0,
            time_limit_s=options.bound_time_limit_s,
        )
        for _, trace in point.traces
    ]
    num_with_slo = sum(bound.num_with_slo for bound in bounds)
    return sum(bound.num_met for bound in bounds) / num_with_slo if num_with_slo else None


def _recording(system: System, point: Point, policy: str, seed: int, done: Run, chunks: tuple[Chunk, ...]) -> Recording:
    (profile,) = tables_of(system).profiles.values()
    return Recording(
        policy=policy,
        mode=system.mode,
        mix=point.mix,
        rate_per_min=point.rate_per_min,
        slo_scale=point.slo_scale,
        seed=seed,
        profile=profile,
        run=done,
        chunks=chunks,
        facts=getattr(system, "facts", {}),
    )


def _rate_text(rate_per_min: float | None) -> str:
    return "all at once" if rate_per_min is None else f"{rate_per_min:.3g}/min"
