"""Workloads for deadline benchmarks: seeded generators of traces, and trace files (JSONL). Knows no policy, no engine.

A trace is a list of `TraceRequest` in order of arrival. Arrivals do not depend on how the system gets on (open loop).
The order of draws is fixed: arrivals, then classes, tiers, models, who states an SLO, steps; so the same seed gives the
same arrivals and classes whatever the SLOs and models are. Streams beside have generators of their own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import numpy as np
from msgspec import Meta

from tetrion.engine.shape import CostKey
from tetrion.entrypoints.bench.arrivals import SESSIONS, Arrivals, Sessions, diurnal, gamma, poisson, production

Size = tuple[int, int]

SIZES: tuple[Size, ...] = ((256, 256), (512, 512), (1024, 1024), (2048, 2048))
BASE_SLO_S: dict[int, tuple[float, ...]] = {8: (1.5, 2.0, 3.0, 5.0), 4: (1.5, 2.5, 5.0, 10.0)}
"""Devices -> seconds for each of `SIZES`, as published for TetriServe (8 GPUs) and scaled for half the devices."""
MIXES = ("uniform", "skewed")
LEAST_SLO_SHARE = 0.25
"""Of a base SLO, for requests with fewer steps than it is meant for."""


class TraceRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of a trace file. `arrival_s` from the start of the trace; `slo_s` None: no deadline; `model` "": the
    only one; `num_branches`: of guidance (only a simulation takes more than one); `tenant`: on whose behalf."""

    arrival_s: Annotated[float, Meta(ge=0, le=1e9)]
    width: Annotated[int, Meta(ge=1, le=65536)]
    height: Annotated[int, Meta(ge=1, le=65536)]
    num_steps: Annotated[int, Meta(ge=1, le=1000)]
    slo_s: Annotated[float, Meta(gt=0, le=86_400)] | None = None
    weight: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    model: str = ""
    num_branches: Annotated[int, Meta(ge=1, le=2)] = 1
    tenant: Annotated[str, Meta(max_length=256)] = ""

    @property
    def cost_key(self) -> str:
        """The text of its `CostKey`."""
        return CostKey(width=self.width, height=self.height, num_branches=self.num_branches).text


Trace = tuple[TraceRequest, ...]


class ModelShare(msgspec.Struct, frozen=True, kw_only=True):
    """A model that requests ask for: `share` of them (in proportion to the others'), in how many guidance branches, and
    what base SLOs are multiplied by."""

    name: str = ""
    share: float = 1.0
    num_branches: int = 1
    slo_scale: float = 1.0


ONE_MODEL = (ModelShare(),)


class Tier(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of caller: `share` of the requests, SLOs times `slo_scale`, and what meeting one is worth."""

    name: str
    share: float
    slo_scale: float = 1.0
    weight: float = 1.0


class Stream(msgspec.Struct, frozen=True, kw_only=True):
    """Requests all alike that arrive beside the others until those end: giants, another tenant's.

    Either `rate_per_min`, as a Poisson process, or `num_requests`, evenly spread. `slo_s`: as it is, not scaled with
    the others'.
    """

    size: Size
    rate_per_min: float | None = None
    num_requests: int | None = None
    num_steps: int = 28
    slo_s: float | None = None
    weight: float = 1.0
    tenant: str = ""

    def __post_init__(self) -> None:
        one_of = (self.rate_per_min is None) != (self.num_requests is None)
        bounds = (
            ("rate_per_min", one_of, "given, or num_requests, but not both"),
            ("rate_per_min", self.rate_per_min is None or 1e-3 <= self.rate_per_min <= 1e6, "from 0.001 to 1000000"),
            ("num_requests", self.num_requests is None or 1 <= self.num_requests <= 100_000, "from 1 to 100000"),
            ("num_steps", 1 <= self.num_steps <= 1000, "from 1 to 1000"),
            ("slo_s", self.slo_s is None or 0 < self.slo_s <= 86_400, "above 0 and at most 86400"),
            ("weight", 0 < self.weight <= 1e6, "above 0 and at most 1000000"),
            ("size", all(1 <= side <= 65536 for side in self.size), "from 1x1 to 65536x65536"),
            ("tenant", len(self.tenant) <= 256, "of at most 256 characters"),
        )
        _check("beside.", self, bounds)


Kind = TypeVar("Kind", Tier, ModelShare)

INTERACTIVE_AND_BATCH = (
    Tier(name="interactive", share=0.7, slo_scale=1.0, weight=1.0),
    Tier(name="batch", share=0.3, slo_scale=10.0, weight=0.25),
)


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """What a trace is drawn from.

    `mix`: "uniform", "skewed" (p ∝ exp(tokens / those of the largest size), towards large pictures). `base_slo_s`:
    seconds for each of `sizes`. `burstiness`: coefficient of variation of gamma inter-arrival times (1 is Poisson).
    `period_s` and `swing`: a diurnal rate of `rate_per_min` × (1 − swing × cos(2π t / period_s)). `sessions`: of
    production arrivals. `tiers`: none is one tier at ×1. `slo_share`: of the requests that state their SLO; the others
    have none. `step_shares` (steps, share): in place of `num_steps`, for which base SLOs are meant; other requests' are
    in proportion to their steps, but not less than a quarter. `tenant`: of all requests but those of streams `beside`.
    Model, size, tier, steps of a request, and whether it states its SLO, do not depend on each other.
    """

    rate_per_min: float
    num_requests: int
    base_slo_s: tuple[float, ...]
    sizes: tuple[Size, ...] = SIZES
    num_steps: int = 28
    mix: str = "uniform"
    slo_scale: float = 1.0
    arrivals: Arrivals = "poisson"
    burstiness: float = 2.0
    period_s: float = 1800.0
    swing: float = 0.8
    tiers: tuple[Tier, ...] = ()
    models: tuple[ModelShare, ...] = ONE_MODEL
    sessions: Sessions = SESSIONS
    slo_share: float = 1.0
    step_shares: tuple[tuple[int, float], ...] = ()
    tenant: str = ""
    beside: tuple[Stream, ...] = ()

    def __post_init__(self) -> None:
        bounds = (
            ("rate_per_min", 1e-3 <= self.rate_per_min <= 1e6, "from 0.001 to 1000000"),
            ("num_requests", self.num_requests >= 1, "at least 1"),
            ("num_steps", self.num_steps >= 1, "at least 1"),
            ("slo_scale", self.slo_scale > 0, "above 0"),
            ("burstiness", self.burstiness > 0, "above 0"),
            ("period_s", self.period_s > 0, "above 0"),
            ("swing", 0 <= self.swing <= 1, "from 0 to 1"),
            ("mix", self.mix in MIXES, f"one of {', '.join(MIXES)}"),
            ("base_slo_s", len(self.base_slo_s) == len(self.sizes), f"one value for each of {len(self.sizes)} sizes"),
            ("base_slo_s", all(0 < slo_s < np.inf for slo_s in self.base_slo_s), "above 0 and finite"),
            ("sizes", len(self.sizes) >= 1, "at least one"),
            ("tiers", all(tier.share > 0 for tier in self.tiers), "of shares above 0"),
            ("models", bool(self.models) and all(0 < m.share < np.inf for m in self.models), "of shares above 0"),
            ("slo_share", 0 <= self.slo_share <= 1, "from 0 to 1"),
            ("step_shares", all(1 <= steps <= 1000 for steps, _ in self.step_shares), "of steps from 1 to 1000"),
            ("step_shares", all(0 < share < np.inf for _, share in self.step_shares), "of shares above 0"),
            ("tenant", len(self.tenant) <= 256, "of at most 256 characters"),
        )
        _check("", self, bounds)

    @property
    def mean_steps(self) -> float:
        return mean_steps(self.num_steps, self.step_shares)


def mean_steps(num_steps: int, step_shares: Sequence[tuple[int, float]]) -> float:
    """Of a request: `num_steps` where there are no shares."""
    shares = sum(share for _, share in step_shares)
    return sum(steps * share for steps, share in step_shares) / shares if step_shares else num_steps


def _check(where: str, value: msgspec.Struct, bounds: Sequence[tuple[str, bool, str]]) -> None:
    """Raises ValueError for the first of (field, whether it is fine, what it must be) that is not."""
    for field, is_fine, expected in bounds:
        if not is_fine:
            raise ValueError(f"{where}{field}: must be {expected}, got {getattr(value, field)!r}")


def base_slo_s(num_devices: int) -> tuple[float, ...]:
    """Base SLOs of the nearest published number of devices that is not larger (fewer than 4: those of 4)."""
    return BASE_SLO_S[8 if num_devices >= 8 else 4]


def make_trace(workload: Workload, seed: int) -> Trace:
    """Draw a trace; same workload and seed, same trace."""
    draw, num = np.random.default_rng(seed), workload.num_requests
    arrivals_s = _arrivals(workload, draw)
    classes = draw.choice(len(workload.sizes), num, p=class_shares(workload.mix, workload.sizes))
    tiers = _choose(draw, workload.tiers or (Tier(name="all", share=1.0),), num)
    models = _choose(draw, workload.models, num)
    states_slo = draw.random(num) < workload.slo_share if workload.slo_share < 1 else np.ones(num, bool)
    steps = _steps(workload, draw)
    trace = []
    for i, (size, tier, model) in enumerate(zip(classes.tolist(), tiers, models, strict=True)):
        width, height = workload.sizes[size]
        slo_s = workload.base_slo_s[size] * model.slo_scale * workload.slo_scale * tier.slo_scale
        if workload.step_shares:
            slo_s *= max(LEAST_SLO_SHARE, steps[i] / workload.num_steps)
        trace.append(
            TraceRequest(
                arrival_s=float(arrivals_s[i]),
                width=width,
                height=height,
                num_steps=steps[i],
                slo_s=slo_s if states_slo[i] else None,
                weight=tier.weight,
                model=model.name,
                num_branches=model.num_branches,
                tenant=workload.tenant,
            )
        )
    return merged(trace, *(_alike(stream, seed, i, float(arrivals_s[-1])) for i, stream in enumerate(workload.beside)))


def merged(*traces: Sequence[TraceRequest]) -> Trace:
    """All their requests in order of arrival; of those at one time, those of earlier traces first."""
    return tuple(sorted((request for trace in traces for request in trace), key=lambda request: request.arrival_s))


def _alike(stream: Stream, seed: int, number: int, end_s: float) -> Trace:
    """The requests of the `number`-th stream until `end_s`."""
    if stream.num_requests is not None:
        times_s = end_s * np.arange(1, stream.num_requests + 1) / (stream.num_requests + 1)
    else:
        assert stream.rate_per_min is not None
        draw = np.random.default_rng((seed, number))
        times_s = np.sort(draw.uniform(0, end_s, draw.poisson(stream.rate_per_min / 60 * end_s)))
    return tuple(
        TraceRequest(
            arrival_s=time_s,
            width=stream.size[0],
            height=stream.size[1],
            num_steps=stream.num_steps,
            slo_s=stream.slo_s,
            weight=stream.weight,
            tenant=stream.tenant,
        )
        for time_s in times_s.tolist()
    )


def _steps(workload: Workload, draw: np.random.Generator) -> list[int]:
    if not workload.step_shares:
        return [workload.num_steps] * workload.num_requests
    shares = np.array([share for _, share in workload.step_shares])
    steps = np.array([steps for steps, _ in workload.step_shares])
    chosen: list[int] = draw.choice(steps, workload.num_requests, p=shares / shares.sum()).tolist()
    return chosen


def _choose(draw: np.random.Generator, kinds: Sequence[Kind], num: int) -> list[Kind]:
    """`num` of `kinds`, by their shares. A single kind needs no draw."""
    if len(kinds) == 1:
        return [kinds[0]] * num
    shares = np.array([kind.share for kind in kinds])
    return [kinds[i] for i in draw.choice(len(kinds), num, p=shares / shares.sum()).tolist()]


def class_name(model: str, size: Size) -> str:
    """As results name a class of requests: "1024x1024", of several models "flux1-dev 1024x1024"."""
    return f"{model} {size[0]}x{size[1]}".lstrip()


def class_shares(mix: str, sizes: Sequence[Size] = SIZES) -> np.ndarray:
    """Probability of each size."""
    if mix == "uniform":
        return np.full(len(sizes), 1 / len(sizes))
    if mix == "skewed":
        tokens = np.array([(width // 16) * (height // 16) for width, height in sizes])
        worth = np.exp(tokens / tokens.max())
        return worth / worth.sum()
    raise ValueError(f"mix: must be one of {', '.join(MIXES)}, got {mix!r}")


def _arrivals(workload: Workload, draw: np.random.Generator) -> np.ndarray:
    num, mean_s = workload.num_requests, 60 / workload.rate_per_min
    match workload.arrivals:
        case "poisson":
            return poisson(draw, num, mean_s)
        case "gamma":
            return gamma(draw, num, mean_s, workload.burstiness)
        case "diurnal":
            return diurnal(draw, num, mean_s, workload.period_s, workload.swing)
        case "production":
            return production(draw, num, mean_s, workload.sessions)


def parse_trace(data: bytes, name: str = "trace") -> Trace:
    """A trace from JSONL; empty lines are skipped. Raises ValueError naming line and field."""
    trace: list[TraceRequest] = []
    decoder = msgspec.json.Decoder(TraceRequest)
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            request = decoder.decode(line)
        except msgspec.ValidationError as error:
            raise ValueError(f"{name}: line {number}: {_with_field(str(error))}") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{name}: line {number}: not a JSON object: {error}") from None
        if trace and request.arrival_s < trace[-1].arrival_s:
            raise ValueError(
                f"{name}: line {number}: arrival_s: must not be before the line above"
                f" ({trace[-1].arrival_s}), got {request.arrival_s}"
            )
        trace.append(request)
    if not trace:
        raise ValueError(f"{name}: has no request")
    return tuple(trace)


def read_trace(path: Path) -> Trace:
    """A trace from a file. Raises ValueError naming file, line and field, or OSError."""
    return parse_trace(path.read_bytes(), str(path))


def format_trace(trace: Sequence[TraceRequest]) -> bytes:
    """The trace as JSONL."""
    return b"".join(msgspec.json.encode(request) + b"\n" for request in trace)


def write_trace(path: Path, trace: Sequence[TraceRequest]) -> None:
    path.write_bytes(format_trace(trace))


def _with_field(message: str) -> str:
    """msgspec says "Expected … - at `$.field`"; a line of the form "field: Expected …" is easier to read."""
    text, separator, where = message.partition(" - at `$.")
    return f"{where.rstrip('`')}: {text}" if separator else message
