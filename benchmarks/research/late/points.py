"""The points of the study: which traces are run on how many devices. Runs nothing.

Loads are those of `compression.load_of`: device time at the narrowest degrees over what there is.
"""

import functools
from collections.abc import Iterator, Sequence

import msgspec

from tetrion.engine.planning.cost.profile import Profile
from tetrion.entrypoints.bench.compression import load_of
from tetrion.entrypoints.bench.workloads import (
    SIZES,
    Size,
    Stream,
    Trace,
    Workload,
    base_slo_s,
    class_shares,
    make_trace,
    mean_steps,
)

SEEDS = (11, 12, 13)
NUM_REQUESTS = 2100
QUICK_REQUESTS = 700
SMALL, LARGER, LARGE, GIANT = (256, 256), (1024, 1024), (2048, 2048), (4096, 4096)
FLOODING, FLOODED = "A", "B"
"""Tenants."""
MIXED_STEPS = ((4, 1.0), (20, 1.0), (50, 1.0))
STEPS = 28


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One point. `group`: which question it belongs to; `name` is unique. `load`: without streams beside."""

    group: str
    name: str
    devices: int
    load: float
    slo_scale: float
    workload: Workload

    def trace(self, seed: int) -> Trace:
        return make_trace(self.workload, seed)


def points(profile: Profile, num_requests: int) -> tuple[Point, ...]:
    """All of them. `num_requests`: of each trace, streams beside apart."""
    return (*_mixes(profile, num_requests), *_others(profile, num_requests))


def _mixes(profile: Profile, num_requests: int) -> Iterator[Point]:
    grid = [(load, slo_scale) for load in (0.4, 0.6, 0.8, 1.0) for slo_scale in (1.2, 1.5)]
    for load, slo_scale in [*grid, (1.3, 1.2), (0.8, 1.0), (0.8, 2.0)]:
        for devices in (8, 4):
            for mix in ("uniform", "skewed"):
                yield _point("mixes", mix, profile, devices, load, slo_scale, num_requests, mix=mix)


def _others(profile: Profile, num_requests: int) -> Iterator[Point]:
    small, num = SIZES[:2], num_requests

    def rate(devices: int, load: float, size: Size) -> float:
        return load / _load_of_one(profile, devices, (size,), "uniform", STEPS)

    for devices in (8, 4):
        at = functools.partial(_point, profile=profile, devices=devices, num_requests=num)
        for burstiness in (2.0, 4.0):
            yield at("bursts", f"cv {burstiness:g}", load=0.8, arrivals="gamma", burstiness=burstiness)
        for load in (0.4, 0.8):
            yield at("production", "production", load=load, arrivals="production")
        yield at("diurnal", "diurnal", load=0.8, arrivals="diurnal")
        flooded = Stream(
            size=LARGER,
            rate_per_min=rate(devices, 0.1, LARGER),
            slo_s=1.2 * base_slo_s(devices)[2],
            tenant=FLOODED,
        )
        yield at("tenants", "flood", load=1.2, sizes=small, tenant=FLOODING, beside=(flooded,))
        giants = Stream(size=LARGE, num_requests=max(1, num // QUICK_REQUESTS), num_steps=50, slo_s=12.0)
        yield at("giants", "2048² in 12 s", load=0.7, sizes=small, beside=(giants,))
        unstated = Stream(size=GIANT, num_requests=1)
        yield at("unstated giant", "4096²", load=0.7, sizes=small, beside=(unstated,), num_requests=900)
        for share in (0.9, 0.5):
            yield at("stated", f"{100 * share:g} % stated", load=1.1, slo_share=share)
        yield at("steps", "4, 20, 50 steps", load=0.8, step_shares=MIXED_STEPS)
        yield at("one class", "1024²", load=0.9, sizes=(LARGER,))


def _point(
    group: str,
    name: str,
    profile: Profile,
    devices: int,
    load: float,
    slo_scale: float = 1.2,
    num_requests: int = NUM_REQUESTS,
    *,
    sizes: tuple[Size, ...] = SIZES,
    mix: str = "uniform",
    step_shares: tuple[tuple[int, float], ...] = (),
    **fields: object,
) -> Point:
    steps = mean_steps(STEPS, step_shares)
    slo_s = dict(zip(SIZES, base_slo_s(devices), strict=True))
    workload = Workload(
        rate_per_min=load / _load_of_one(profile, devices, sizes, mix, steps),
        num_requests=num_requests,
        num_steps=STEPS,
        base_slo_s=tuple(slo_s[size] for size in sizes),
        sizes=sizes,
        mix=mix,
        slo_scale=slo_scale,
        step_shares=step_shares,
        **fields,  # type: ignore[arg-type]
    )
    return Point(
        group=group,
        name=f"{name}, {devices} devices, load {load:g}, SLO ×{slo_scale:g}",
        devices=devices,
        load=load,
        slo_scale=slo_scale,
        workload=workload,
    )


def _load_of_one(profile: Profile, devices: int, sizes: Sequence[Size], mix: str, steps: float) -> float:
    """The load of one request a minute."""
    return load_of(1.0, profile, sizes, class_shares(mix, sizes).tolist(), steps, devices)
