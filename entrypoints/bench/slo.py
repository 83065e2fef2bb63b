"""`tetrion bench slo`: attainment of deadlines, policy by policy, on the same traces.

Points are policies × mixes × rates × SLO scales, each over all seeds; or policies × SLO scales on given trace files.
Simulation only so far: the real engine loop in virtual time on a profile.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tetrion.engine.planning.profile import Profile, read_profile
from tetrion.engine.planning.registry import get_planner
from tetrion.engine.simulated import Disturbance
from tetrion.entrypoints.bench.record import make_record, write_record
from tetrion.entrypoints.bench.simulation import MAX_QUEUED, Loss, simulate
from tetrion.entrypoints.bench.slo_statistics import Row, summarise
from tetrion.entrypoints.bench.slo_table import table
from tetrion.entrypoints.bench.workloads import (
    INTERACTIVE_AND_BATCH,
    Arrivals,
    Trace,
    TraceRequest,
    Workload,
    base_slo_s,
    make_trace,
    read_trace,
)
from tetrion.entrypoints.errors import InputError

MAX_DEVICES = 1024


class SloOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to run. `traces` given: those files, each a point of its own; else traces are drawn for every mix, rate and
    seed. `slo_scales` multiply the SLOs in either case. `noise`, `bias`, `step_overhead_ms`, `regroup_ms`: see
    `Disturbance`. `losses`: devices that die in every run."""

    profile: Profile
    num_devices: int
    policies: tuple[str, ...] = ("horizon",)
    traces: tuple[tuple[str, Trace], ...] = ()
    mixes: tuple[str, ...] = ("uniform",)
    rates_per_min: tuple[float, ...] = (12.0,)
    slo_scales: tuple[float, ...] = (1.0,)
    seeds: tuple[int, ...] = (11, 12, 13)
    num_requests: int = 700
    num_steps: int = 28
    arrivals: Arrivals = "poisson"
    with_tiers: bool = False
    noise: float = 0.0
    bias: float = 0.0
    step_overhead_ms: float = 0.3
    regroup_ms: float = 0.2
    losses: tuple[Loss, ...] = ()


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One workload: the traces that every policy runs, and what a row says of them."""

    mix: str
    rate_per_min: float | None
    slo_scale: float
    traces: tuple[tuple[int, Trace], ...]
    """(seed, trace)"""


def points(options: SloOptions) -> Iterator[Point]:
    """The workloads of a run, in the order of its rows."""
    for name, trace in options.traces:
        for slo_scale in options.slo_scales:
            scaled = tuple(_scaled(trace, slo_scale))
            yield Point(mix=name, rate_per_min=_rate_per_min(trace), slo_scale=slo_scale, traces=((0, scaled),))
    if options.traces:
        return
    for mix in options.mixes:
        for rate_per_min in options.rates_per_min:
            for slo_scale in options.slo_scales:
                workload = Workload(
                    rate_per_min=rate_per_min,
                    num_requests=options.num_requests,
                    num_steps=options.num_steps,
                    mix=mix,
                    slo_scale=slo_scale,
                    base_slo_s=base_slo_s(options.num_devices),
                    arrivals=options.arrivals,
                    tiers=INTERACTIVE_AND_BATCH if options.with_tiers else (),
                )
                traces = tuple((seed, make_trace(workload, seed)) for seed in options.seeds)
                yield Point(mix=mix, rate_per_min=rate_per_min, slo_scale=slo_scale, traces=traces)


def check(options: SloOptions) -> None:
    """Raises ValueError, naming the field, for what would stop `run` on its way."""
    if not 1 <= options.num_devices <= MAX_DEVICES:
        raise ValueError(f"devices: must be from 1 to {MAX_DEVICES}, got {options.num_devices}")
    for policy in options.policies:
        get_planner(policy)
    for slo_scale in options.slo_scales:
        if not 0 < slo_scale < math.inf:
            raise ValueError(f"slo_scale: must be above 0 and finite, got {slo_scale}")
    for loss in options.losses:
        if not 0 <= loss.device_id < options.num_devices:
            raise ValueError(f"lose: device must be from 0 to {options.num_devices - 1}, got {loss.device_id}")
    _disturbance(options, seed=0)
    for point in points(options):
        for _, trace in point.traces:
            if len(trace) > MAX_QUEUED:
                raise ValueError(f"trace: must have at most {MAX_QUEUED} requests, got {len(trace)}")


def run(options: SloOptions, report: Callable[[str], None] = lambda _: None) -> tuple[list[Row], list[Row]]:
    """Rows (a fixed set of fields, unknown ones None) and their diagnostics, in one order. `options`: checked."""
    rows, diagnostics = [], []
    for point in points(options):
        for policy in options.policies:
            report(f"{policy}: {point.mix}, {_rate_text(point.rate_per_min)}, SLO ×{point.slo_scale:g}")
            row, beside = _run_point(options, point, policy)
            rows.append(row)
            diagnostics.append(beside)
    return rows, diagnostics


def command(
    *,
    simulate: bool = True,
    profile: Path,
    devices: int = 8,
    trace: Sequence[Path] = (),
    policy: Sequence[str] = ("horizon",),
    mix: Sequence[str] = ("uniform",),
    rate: Sequence[float] = (12.0,),
    slo_scale: Sequence[float] = (1.0,),
    seed: Sequence[int] = (11, 12, 13),
    num_requests: int = 700,
    num_steps: int = 28,
    arrivals: Arrivals = "poisson",
    tiers: bool = False,
    noise: float = 0.0,
    bias: float = 0.0,
    step_overhead_ms: float = 0.3,
    regroup_ms: float = 0.2,
    lose: Sequence[str] = (),
    output: Path | None = None,
    as_json: bool = False,
) -> dict[str, Any]:
    """What `tetrion bench slo` does: run, print the table (or one JSON object), write `output`.

    `lose`: "SECONDS:DEVICE" each. Raises InputError for what the caller can put right.
    """
    if not simulate:
        raise InputError("simulate: this version has no live mode; add --simulate")
    try:
        options = SloOptions(
            profile=read_profile(profile),
            num_devices=devices,
            policies=tuple(policy),
            traces=tuple((path.stem, read_trace(path)) for path in trace),
            mixes=tuple(mix),
            rates_per_min=tuple(rate),
            slo_scales=tuple(slo_scale),
            seeds=tuple(seed),
            num_requests=num_requests,
            num_steps=num_steps,
            arrivals=arrivals,
            with_tiers=tiers,
            noise=noise,
            bias=bias,
            step_overhead_ms=step_overhead_ms,
            regroup_ms=regroup_ms,
            losses=tuple(parse_loss(text) for text in lose),
        )
        check(options)
    except ValueError as error:
        raise InputError(str(error)) from None
    rows, diagnostics = run(options, report=lambda text: print(text, file=sys.stderr, flush=True))
    record = make_record(_command_line(options, profile, trace), rows) | {"diagnostics": diagnostics}
    text = write_record(record, output)
    print(text if as_json else table(rows, diagnostics))
    return record


def parse_loss(text: str) -> Loss:
    """`12.5:3`: device 3 dies 12.5 seconds after the start. Raises ValueError."""
    time_text, _, device_text = text.partition(":")
    try:
        loss = Loss(time_s=float(time_text), device_id=int(device_text))
    except ValueError:
        raise ValueError(f"lose: expected SECONDS:DEVICE such as 12.5:3, got {text!r}") from None
    if not 0 <= loss.time_s < float("inf"):
        raise ValueError(f"lose: the time must be at least 0 and finite, got {text!r}")
    return loss


def _run_point(options: SloOptions, point: Point, policy: str) -> tuple[Row, Row]:
    runs = [
        simulate(
            trace,
            profile=options.profile,
            policy=policy,
            num_devices=options.num_devices,
            duration=_disturbance(options, seed),
            losses=options.losses,
        )
        for seed, trace in point.traces
    ]
    measured, diagnostics = summarise(runs)
    row = {
        "policy": policy,
        "mode": "sim",
        "devices": options.num_devices,
        "mix": point.mix,
        "rate_per_min": point.rate_per_min,
        "slo_scale": point.slo_scale,
        **measured,
        "joules_per_image": None,
        "bound": None,
    }
    return row, {"policy": policy, "mix": point.mix, "seeds": [seed for seed, _ in point.traces], **diagnostics}


def _disturbance(options: SloOptions, seed: int) -> Disturbance:
    return Disturbance(
        seed=seed,
        noise=options.noise,
        bias=options.bias,
        step_overhead_s=options.step_overhead_ms / 1e3,
        regroup_s=options.regroup_ms / 1e3,
    )


def _scaled(trace: Trace, slo_scale: float) -> Iterator[TraceRequest]:
    for request in trace:
        slo_s = None if request.slo_s is None else request.slo_s * slo_scale
        yield msgspec.structs.replace(request, slo_s=slo_s)


def _rate_per_min(trace: Trace) -> float | None:
    """Mean rate over the trace; None for a single instant."""
    span_s = trace[-1].arrival_s - trace[0].arrival_s
    return 60 * (len(trace) - 1) / span_s if span_s > 0 else None


def _rate_text(rate_per_min: float | None) -> str:
    return "all at once" if rate_per_min is None else f"{rate_per_min:.3g}/min"


def _command_line(options: SloOptions, profile: Path, traces: Sequence[Path]) -> str:
    """The command that gives the same rows."""
    words = ["tetrion bench slo --simulate", f"--profile {profile}", f"--devices {options.num_devices}"]
    words += [f"--policy {policy}" for policy in options.policies]
    words += [f"--slo-scale {scale:g}" for scale in options.slo_scales]
    if traces:
        words += [f"--trace {path}" for path in traces]
    else:
        words += [f"--mix {mix}" for mix in options.mixes]
        words += [f"--rate {rate:g}" for rate in options.rates_per_min]
        words += [f"--seed {seed}" for seed in options.seeds]
        words += [f"--num-requests {options.num_requests}", f"--num-steps {options.num_steps}"]
        words += [f"--arrivals {options.arrivals}"] + ["--tiers"] * options.with_tiers
    words += [f"--noise {options.noise:g}", f"--bias {options.bias:g}"]
    words += [f"--step-overhead-ms {options.step_overhead_ms:g}", f"--regroup-ms {options.regroup_ms:g}"]
    words += [f"--lose {loss.time_s:g}:{loss.device_id}" for loss in options.losses]
    return " ".join(words)
