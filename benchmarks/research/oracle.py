"""What energy-aware planning could save at most, and what it did: oracles and the joules of simulated runs. Pure.

Each oracle draws every request of a trace with the machine to itself, within its deadline if that is possible at all
(else at the fastest degree). `cheapest-degree` keeps to the one degree that takes least joules; `cheapest-mixture` may
change the degree once, which is the least that anybody can do. They know no other request, so that they are no
schedules but the far end of a scale; the near end is what mode `fastest` takes.

Joules are those of the profile: steps, and encode and decode where it knows them.
"""

import math
from collections.abc import Mapping, Sequence

import msgspec

from tetrion.engine.planning.degrees import DegreeTable, DegreeTables
from tetrion.engine.planning.energy_mode import cheapest_plan
from tetrion.engine.planning.slo import MARGIN_S
from tetrion.entrypoints.bench.outcomes import Outcome
from tetrion.entrypoints.bench.workloads import Size, Trace, TraceRequest


class Spent(msgspec.Struct, frozen=True, kw_only=True):
    """One drawn request: joules, GPU-seconds, whether in time (None: no SLO), seconds from arrival to end, and what its
    receipt says of a live run (None: nothing)."""

    size: Size
    joules: float
    gpu_s: float
    is_met: bool | None
    latency_s: float
    metered_j: float | None = None


class ClassFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One size, or all. `with_idle_j`: joules a picture with an equal share of what idle GPUs draw; None: their power
    was not given. `metered_j_per_image`: active joules by receipts; None unless all of them know."""

    requests: int
    attainment: float | None
    joules_per_image: float
    with_idle_j: float | None
    mean_s: float
    metered_j_per_image: float | None


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """All requests of all traces of a point. `with_idle_j` counts idle GPUs until the last end of any system.
    `metered_j`: by receipts."""

    joules: float
    with_idle_j: float | None
    attainment: float | None
    metered_j: float | None


class Saving(msgspec.Struct, frozen=True, kw_only=True):
    """One mode between the two ends. `realised`: by oracle, the share of its saving (None where it has none).
    `lower_by_points`: attainment lost against `fastest`, in points. `metered_saved_j`: by receipts."""

    saved_j: float
    metered_saved_j: float | None
    possible_j: dict[str, float]
    realised: dict[str, float | None]
    lower_by_points: float | None


def cheapest_degree(request: TraceRequest, table: DegreeTable, room_s: float, overhead_s: float) -> tuple[int, ...]:
    """The degree of each step; none if no degree is in time."""
    in_time = [d for d in table.degrees if request.num_steps * (table.step_s[d] + overhead_s) <= room_s]
    return (min(in_time, key=lambda d: (table.step_j[d], d)),) * request.num_steps if in_time else ()


def cheapest_mixture(request: TraceRequest, table: DegreeTable, room_s: float, overhead_s: float) -> tuple[int, ...]:
    plan = cheapest_plan(table, request.num_steps, room_s - request.num_steps * overhead_s)
    return () if plan is None else plan.degrees


ORACLES = {"cheapest-degree": cheapest_degree, "cheapest-mixture": cheapest_mixture}


def oracle(name: str, trace: Trace, tables: DegreeTables, step_overhead_s: float = 0.0) -> list[Spent]:
    """Every request as the oracle of that name draws it."""
    return [_alone(name, request, tables[request.model, request.cost_key], step_overhead_s) for request in trace]


def spent(
    outcomes: Sequence[Outcome], tables: DegreeTables, metered_j: Mapping[int, float | None] | None = None
) -> list[Spent]:
    """What a run took, by the degrees that it used. Requests that failed are not in it. `metered_j`: by place in the
    trace."""
    metered_j = metered_j or {}
    return [
        Spent(
            size=(outcome.request.width, outcome.request.height),
            joules=_joules(tables[outcome.request.model, outcome.request.cost_key], outcome.degrees),
            gpu_s=outcome.gpu_s or 0.0,
            is_met=outcome.is_met,
            latency_s=outcome.latency_s,
            metered_j=metered_j.get(number),
        )
        for number, outcome in enumerate(outcomes)
        if outcome.latency_s is not None
    ]


def idle_j(drawn: Sequence[Spent], device_s: float, idle_watts: float) -> float:
    """Joules that devices draw while nothing runs on them, of `device_s` device-seconds altogether."""
    return max(0.0, device_s - sum(one.gpu_s for one in drawn)) * idle_watts


def by_class(drawn: Sequence[Spent], idle: float | None) -> dict[str, ClassFigures]:
    """The figures of all, then of each size by area. `idle`: joules of idle devices, shared equally."""
    sizes = sorted({one.size for one in drawn}, key=lambda size: (size[0] * size[1], size))
    share = None if idle is None else idle / len(drawn)
    found = {"all": _figures(drawn, share)}
    for size in sizes:
        found[f"{size[0]}x{size[1]}"] = _figures([one for one in drawn if one.size == size], share)
    return found


def totals(drawn: Sequence[Spent], idle: float | None) -> Totals:
    joules = sum(one.joules for one in drawn)
    return Totals(
        joules=joules,
        with_idle_j=None if idle is None else joules + idle,
        attainment=_attainment(drawn),
        metered_j=_metered_j(drawn),
    )


def saving(mode: Totals, fastest: Totals, best: Mapping[str, Totals]) -> Saving:
    """`best`: by oracle."""
    saved_j = fastest.joules - mode.joules
    possible_j = {name: fastest.joules - found.joules for name, found in best.items()}
    known = mode.attainment is not None and fastest.attainment is not None
    is_metered = mode.metered_j is not None and fastest.metered_j is not None
    return Saving(
        saved_j=saved_j,
        metered_saved_j=fastest.metered_j - mode.metered_j if is_metered else None,  # type: ignore[operator]
        possible_j=possible_j,
        realised={name: saved_j / joules if joules > 0 else None for name, joules in possible_j.items()},
        lower_by_points=100 * (fastest.attainment - mode.attainment) if known else None,  # type: ignore[operator]
    )


def _alone(name: str, request: TraceRequest, table: DegreeTable, step_overhead_s: float) -> Spent:
    aux_s = sum(table.cost.aux_s.values())
    room_s = math.inf if request.slo_s is None else request.slo_s - aux_s - MARGIN_S
    degrees = ORACLES[name](request, table, room_s, step_overhead_s) or (table.widest,) * request.num_steps
    latency_s = aux_s + sum(table.step_s[degree] + step_overhead_s for degree in degrees)
    return Spent(
        size=(request.width, request.height),
        joules=_joules(table, degrees),
        gpu_s=aux_s + sum(degree * (table.step_s[degree] + step_overhead_s) for degree in degrees),
        is_met=None if request.slo_s is None else latency_s <= request.slo_s,
        latency_s=latency_s,
    )


def _joules(table: DegreeTable, degrees: Sequence[int]) -> float:
    known_j, cost = table.cost.step_by_degree_j, table.cost
    return sum(known_j[degree] for degree in degrees) + sum(cost.aux_j.values())


def _metered_j(drawn: Sequence[Spent]) -> float | None:
    known = [one.metered_j for one in drawn if one.metered_j is not None]
    return sum(known) if known and len(known) == len(drawn) else None


def _figures(drawn: Sequence[Spent], idle_share_j: float | None) -> ClassFigures:
    joules, metered_j = sum(one.joules for one in drawn) / len(drawn), _metered_j(drawn)
    return ClassFigures(
        requests=len(drawn),
        attainment=_attainment(drawn),
        joules_per_image=joules,
        with_idle_j=None if idle_share_j is None else joules + idle_share_j,
        mean_s=sum(one.latency_s for one in drawn) / len(drawn),
        metered_j_per_image=None if metered_j is None else metered_j / len(drawn),
    )


def _attainment(drawn: Sequence[Spent]) -> float | None:
    met = [one.is_met for one in drawn if one.is_met is not None]
    return sum(met) / len(met) if met else None
