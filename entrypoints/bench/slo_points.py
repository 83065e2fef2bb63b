"""The points of `tetrion bench slo`: which traces are run, and what a row says of them. Runs nothing."""

import math
from collections.abc import Callable, Iterator, Mapping

import msgspec

from tetrion.engine.planning.cost.tables import CostTables
from tetrion.engine.shape import parse_cost_key
from tetrion.entrypoints.bench.arrivals import Arrivals
from tetrion.entrypoints.bench.compression import calibration, compress, load_of
from tetrion.entrypoints.bench.simulation import MAX_QUEUED
from tetrion.entrypoints.bench.workloads import (
    INTERACTIVE_AND_BATCH,
    ONE_MODEL,
    SIZES,
    ModelShare,
    Size,
    Stream,
    Trace,
    TraceRequest,
    Workload,
    base_slo_s,
    class_name,
    class_shares,
    make_trace,
    mean_steps,
)


class Grid(msgspec.Struct, frozen=True, kw_only=True):
    """Which workloads to run. `traces` given (name, trace): those, each a point of its own; else traces are drawn for
    every mix, rate and seed. `slo_scales` multiply the SLOs in either case.

    `loads` given: rates follow from them (see `load_of`). `base_slo_s`: seconds for each of `sizes`; empty: those
    published for the number of devices, whatever the model. `calibrate_slo`: fit those of each model to the machine
    (see `calibration`). `first`: only so many requests of each trace. `compress`: see there. The other fields are those
    of `Workload`.
    """

    traces: tuple[tuple[str, Trace], ...] = ()
    mixes: tuple[str, ...] = ("uniform",)
    rates_per_min: tuple[float, ...] = (12.0,)
    loads: tuple[float, ...] = ()
    slo_scales: tuple[float, ...] = (1.0,)
    seeds: tuple[int, ...] = (11, 12, 13)
    num_requests: int = 700
    num_steps: int = 28
    sizes: tuple[Size, ...] = SIZES
    base_slo_s: tuple[float, ...] = ()
    calibrate_slo: bool = False
    arrivals: Arrivals = "poisson"
    burstiness: float = 2.0
    slo_share: float = 1.0
    step_shares: tuple[tuple[int, float], ...] = ()
    tenant: str = ""
    beside: tuple[Stream, ...] = ()
    with_tiers: bool = False
    first: int | None = None
    compress: int = 1
    models: tuple[ModelShare, ...] = ONE_MODEL


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One workload: the traces that every policy runs, and what a row says of them. `rate_per_min` None: all of a trace
    arrives at once. Rate and SLOs of a compressed trace are those before compression."""

    mix: str
    rate_per_min: float | None
    slo_scale: float
    traces: tuple[tuple[int, Trace], ...]
    """(seed, trace)"""


def models_of(tables: CostTables, weights: Mapping[str, float]) -> tuple[ModelShare, ...]:
    """The models that have a table: as many requests of each unless `weights` say otherwise, drawn in the guidance
    branches that the table is measured with (the most, if with several). Raises ValueError for a weight of no model."""
    if unknown := set(weights) - set(tables.profiles):
        raise ValueError(f"share: {min(unknown)!r} is none of the models: {', '.join(map(repr, tables.profiles))}")
    return tuple(
        ModelShare(
            name=name,
            share=weights.get(name, 1.0),
            num_branches=max(parse_cost_key(text).num_branches for text in profile.classes),
        )
        for name, profile in tables.profiles.items()
    )


def points(grid: Grid, num_devices: int, tables: Callable[[], CostTables]) -> Iterator[Point]:
    """The workloads of a run, in the order of its rows. `tables()` is asked for only if SLOs or compression need it.
    Raises ValueError, naming the field, for one that is not possible."""
    for slo_scale in grid.slo_scales:
        if not 0 < slo_scale < math.inf:
            raise ValueError(f"slo_scale: must be above 0 and finite, got {slo_scale}")
    if grid.first is not None and grid.first < 1:
        raise ValueError(f"first: must be at least 1, got {grid.first}")
    for name, trace in grid.traces:
        for slo_scale in grid.slo_scales:
            scaled = tuple(_scaled(request, slo_scale) for request in trace)
            cut = _cut(grid, scaled, tables)
            yield Point(mix=name, rate_per_min=_rate_per_min(trace), slo_scale=slo_scale, traces=((0, cut),))
    if grid.traces:
        return
    models = _fitted_models(grid, num_devices, tables)
    for mix in grid.mixes:
        for rate_per_min in _rates(grid, mix, num_devices, tables):
            for slo_scale in grid.slo_scales:
                workload = Workload(
                    rate_per_min=rate_per_min,
                    num_requests=grid.num_requests,
                    num_steps=grid.num_steps,
                    sizes=grid.sizes,
                    mix=mix,
                    slo_scale=slo_scale,
                    base_slo_s=_base_slo_s(grid, num_devices),
                    arrivals=grid.arrivals,
                    burstiness=grid.burstiness,
                    slo_share=grid.slo_share,
                    step_shares=grid.step_shares,
                    tenant=grid.tenant,
                    beside=grid.beside,
                    tiers=INTERACTIVE_AND_BATCH if grid.with_tiers else (),
                    models=models,
                )
                traces = tuple((seed, _cut(grid, make_trace(workload, seed), tables)) for seed in grid.seeds)
                yield Point(mix=mix, rate_per_min=rate_per_min, slo_scale=slo_scale, traces=traces)


def slos_of(grid: Grid, num_devices: int, tables: Callable[[], CostTables]) -> dict[str, float]:
    """Base SLOs of drawn traces in seconds, before compression, by class (see `class_name`)."""
    return {
        class_name(model.name, size): slo_s * model.slo_scale
        for model in _fitted_models(grid, num_devices, tables)
        for size, slo_s in zip(grid.sizes, _base_slo_s(grid, num_devices), strict=True)
    }


def _base_slo_s(grid: Grid, num_devices: int) -> tuple[float, ...]:
    """Of each size, before they are fitted to the machine."""
    return grid.base_slo_s or _published_slo_s(grid, num_devices)


def _fitted_models(grid: Grid, num_devices: int, tables: Callable[[], CostTables]) -> tuple[ModelShare, ...]:
    if not grid.calibrate_slo:
        return grid.models
    slos_s = _base_slo_s(grid, num_devices)

    def fitted(model: ModelShare) -> ModelShare:
        profile = tables().profiles[model.name]
        factor = calibration(slos_s, grid.sizes, grid.num_steps, profile, num_devices, model.num_branches)
        return msgspec.structs.replace(model, slo_scale=factor)

    return tuple(map(fitted, grid.models))


def _rates(grid: Grid, mix: str, num_devices: int, tables: Callable[[], CostTables]) -> tuple[float, ...]:
    """Arrivals per minute, to three digits where they come from loads."""
    if not grid.loads:
        return grid.rates_per_min
    if any(not 0 < load < math.inf for load in grid.loads):
        raise ValueError(f"load: must be above 0 and finite, got {min(grid.loads)}")
    load_of_one = sum(loads_of(1.0, grid, mix, num_devices, tables()).values())
    return tuple(float(f"{load / load_of_one:.3g}") for load in grid.loads)


def loads_of(rate_per_min: float, grid: Grid, mix: str, num_devices: int, tables: CostTables) -> dict[str, float]:
    """What the requests of each model add to the load (see `load_of`), without streams beside."""
    shares, total = class_shares(mix, grid.sizes).tolist(), sum(model.share for model in grid.models)
    return {
        model.name: load_of(
            rate_per_min * model.share / total,
            tables.profiles[model.name],
            grid.sizes,
            shares,
            mean_steps(grid.num_steps, grid.step_shares),
            num_devices,
            model.num_branches,
        )
        for model in grid.models
    }


def samples(grid: Grid) -> Trace:
    """Requests that a model must be able to draw before anything is run: those of the traces, or one of each size."""
    if grid.traces:
        return tuple(request for _, trace in grid.traces for request in trace[: grid.first])
    return tuple(
        TraceRequest(arrival_s=0.0, width=width, height=height, num_steps=grid.num_steps)
        for width, height in grid.sizes
    )


def _published_slo_s(grid: Grid, num_devices: int) -> tuple[float, ...]:
    if grid.sizes != SIZES:
        raise ValueError("base_slo: sizes other than the published ones need a base SLO each (--base-slo)")
    return base_slo_s(num_devices)


def _cut(grid: Grid, trace: Trace, tables: Callable[[], CostTables]) -> Trace:
    trace = trace[: grid.first]
    if len(trace) > MAX_QUEUED:
        raise ValueError(f"trace: must have at most {MAX_QUEUED} requests, got {len(trace)}")
    return compress(trace, grid.compress, tables()) if grid.compress != 1 else trace


def _scaled(request: TraceRequest, slo_scale: float) -> TraceRequest:
    slo_s = None if request.slo_s is None else request.slo_s * slo_scale
    return msgspec.structs.replace(request, slo_s=slo_s)


def _rate_per_min(trace: Trace) -> float | None:
    """Mean rate over the trace; None for a single instant."""
    span_s = trace[-1].arrival_s - trace[0].arrival_s
    return 60 * (len(trace) - 1) / span_s if span_s > 0 else None
