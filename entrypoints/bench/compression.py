"""Workloads fitted to a machine: base SLOs from what it costs there, and the same load in a fraction of the time.

Pure functions of traces and a cost table.
"""

import math
from collections.abc import Sequence

import msgspec

from tetrion.engine.planning.cost.profile import Profile
from tetrion.engine.planning.cost.tables import CostTables
from tetrion.engine.planning.degrees import legal_for, usable_degrees
from tetrion.engine.shape import CostKey
from tetrion.entrypoints.bench.workloads import Size, Trace, TraceRequest

SLO_HEADROOM = 1.1
"""The largest picture alone at the widest degree takes its base SLO divided by this."""


def calibration(
    base_slo_s: Sequence[float],
    sizes: Sequence[Size],
    num_steps: int,
    profile: Profile,
    num_devices: int,
    num_branches: int = 1,
) -> float:
    """The factor for `base_slo_s` with which the largest size, alone on the machine at the widest degree that its
    devices allow (on four: 4, on two: 2), takes 1/1.1 of its SLO: with base SLOs for another GPU, deadlines here are as
    tight as they were there."""
    largest = max(range(len(sizes)), key=lambda i: sizes[i][0] * sizes[i][1])
    key = _key(sizes[largest], num_branches)
    cost = profile.cost(key)
    alone_s = sum(cost.aux_s.values()) + num_steps * cost.step_s(_degrees(key, profile, num_devices)[-1])
    return SLO_HEADROOM * alone_s / base_slo_s[largest]


def load_of(
    rate_per_min: float,
    profile: Profile,
    sizes: Sequence[Size],
    shares: Sequence[float],
    num_steps: float,
    num_devices: int,
    num_branches: int = 1,
) -> float:
    """Share of the devices' time that arrivals take whose requests all run at their narrowest degree, encode and decode
    included. `shares`: of each of `sizes`. At 1 the machine is saturated whatever the policy."""
    device_s = 0.0
    for size, share in zip(sizes, shares, strict=True):
        key = _key(size, num_branches)
        cost = profile.cost(key)
        degree = _degrees(key, profile, num_devices)[0]
        device_s += share * (sum(cost.aux_s.values()) + num_steps * degree * cost.step_s(degree))
    return rate_per_min / 60 * device_s / num_devices


def offered_load(trace: Sequence[TraceRequest], tables: CostTables, num_devices: int) -> float:
    """As `load_of`, of a trace as it is: what its requests take in the time in which they arrive."""
    device_s = 0.0
    for request in trace:
        cost = tables.cost(request.model, request.cost_key)
        degree = _degrees(request.cost_key, tables.profiles[request.model], num_devices)[0]
        device_s += sum(cost.aux_s.values()) + request.num_steps * degree * cost.step_s(degree)
    span_s = trace[-1].arrival_s if trace else 0.0
    return device_s / (span_s * num_devices) if span_s else math.inf


def _key(size: Size, num_branches: int) -> str:
    return CostKey(width=size[0], height=size[1], num_branches=num_branches).text


def _degrees(key: str, profile: Profile, num_devices: int) -> Sequence[int]:
    """Ascending."""
    return usable_degrees(profile.cost(key), legal_for(profile, key, num_devices))


def compress(trace: Trace, factor: int, tables: CostTables) -> Trace:
    """The trace with arrival times, steps and the part of each SLO that is left for denoising divided by `factor`.

    Encode and decode stay whole and inside the SLO: SLO' = encode + decode + (SLO − encode − decode) / factor. Beside
    the denoising they weigh `factor` times as much as before. Raises ValueError where steps cannot be divided.
    """
    if factor < 1:
        raise ValueError(f"compress: must be at least 1, got {factor}")
    return tuple(_compressed(request, factor, tables) for request in trace)


def _compressed(request: TraceRequest, factor: int, tables: CostTables) -> TraceRequest:
    if request.num_steps % factor:
        raise ValueError(f"compress: {request.num_steps} steps cannot be divided by {factor}")
    slo_s = request.slo_s
    if slo_s is not None:
        aux_s = sum(tables.cost(request.model, request.cost_key).aux_s.values())
        slo_s = aux_s + (slo_s - aux_s) / factor
    return msgspec.structs.replace(
        request, arrival_s=request.arrival_s / factor, num_steps=request.num_steps // factor, slo_s=slo_s
    )
