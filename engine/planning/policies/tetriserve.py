"""The policies `tetriserve` (`tetriserve-gN`) and `tetriserve-continuous`, after TetriServe (arXiv:2510.01565).

One decision: for each request that can still be in time, the mix of two adjacent degrees that meets its deadline with
the least GPU-time; a group knapsack over {none, either degree} that maximises how many requests are not definitely late
at the next round; those it passed over start at the narrower degree, one device goes to each request that is late
already, and whoever gains most is widened.

`tetriserve` decides once a round, a fixed stretch of time of N steps of the slowest class at its widest degree (5 as
published). Rounds lie on a grid of the clock; between two of them only encodes and decodes start. Degrees are chosen by
the pace they make in rounds: of a step that takes 0.6 rounds, one fits.
`tetriserve-continuous` decides at every event, for chunks of the usual length.
"""

import math
from collections.abc import Callable, Sequence

import msgspec

from tetrion.engine.planning.cost.profile import SizeCost
from tetrion.engine.planning.degrees import ClassName, DegreeTable
from tetrion.engine.planning.forward_fill import Work
from tetrion.engine.planning.policies.leftover import Option, widen, widen_whoever_gains
from tetrion.engine.planning.policies.stages import ready_to_denoise, start_aux
from tetrion.engine.planning.round_builder import RoundBuilder
from tetrion.engine.planning.slo import denoise_due_s, due_s, urgency
from tetrion.engine.planning.snapshot import Planner, RoundPlan, Snapshot

PUBLISHED_STEPS = 5
GRID_S = 0.010
"""Rounds are rounded up to this, so that a small correction of the profile does not move the grid."""
OPENING_S = 0.040
"""A round's decisions may be made until this long after its start (an encode may end, a command be late)."""
OVERRUN = 0.02
"""Chunks may end this share of a round after it: small overheads must not cost a step."""

Tables = dict[ClassName, DegreeTable]


def plan_continuously(snapshot: Snapshot) -> RoundPlan:
    """The next round of `tetriserve-continuous`. Pure: same snapshot, same plan."""
    if not snapshot.devices:
        return RoundPlan()
    builder, chunk_s = RoundBuilder(snapshot), snapshot.config.chunk_s
    works = _begin(builder, snapshot.tables)
    decide(works, builder.room, snapshot.now_s + chunk_s)
    _start(builder, works, lambda step_s, _: int(chunk_s / step_s + 1e-9))
    return builder.build()


def rounds_planner(steps_per_round: int) -> Planner:
    """The policy `tetriserve-g<steps_per_round>`."""
    if steps_per_round < 1:
        raise ValueError(f"policy: tetriserve-gN needs N of at least 1, got {steps_per_round}")

    def plan(snapshot: Snapshot) -> RoundPlan:
        if not snapshot.devices:
            return RoundPlan()
        builder, length_s = RoundBuilder(snapshot), round_s(snapshot, steps_per_round)
        start_s = length_s * math.floor((builder.limit_s + 1e-9) / length_s)
        works = _begin(builder, _paced_tables(snapshot, length_s))
        if builder.limit_s - start_s <= snapshot.config.lead_s + min(OPENING_S, length_s / 4):
            decide(works, builder.room, start_s + length_s)
            end_s = start_s + length_s * (1 + OVERRUN)
            _start(builder, works, lambda step_s, from_s: int((end_s - from_s) / step_s + 1e-9))
        if snapshot.all_requests:
            builder.wake_at(start_s + length_s - snapshot.config.lead_s)
        return builder.build()

    return plan


def round_s(snapshot: Snapshot, steps_per_round: int) -> float:
    """Length of a round: so many steps of the slowest class in the cost tables at the widest degree of the machine."""
    tables, profiles = snapshot.tables, snapshot.costs.profiles
    slowest_s = max(tables[model, key].fastest_step_s for model, profile in profiles.items() for key in profile.classes)
    return GRID_S * math.ceil(steps_per_round * slowest_s / GRID_S - 1e-9)


def decide(works: Sequence[Work], room: int, next_s: float) -> None:
    """Set the targets of `works` (all ready, most urgent first) within `room` devices; the next decision is at
    `next_s`."""
    on_time = [work for work in works if _can_be_in_time(work)]
    left = widen([(work, options) for work in on_time if (options := _saving_degrees(work, next_s))], room)
    late = [work for work in works if not _can_be_in_time(work)]
    for works_in_turn, wanted in ((on_time, least_gpu_time_mix), (late, _narrowest)):
        for work in works_in_turn:
            if not work.target:
                work.target = work.table.largest[min(wanted(work)[0], left)]
                left -= work.target
    widen_whoever_gains(on_time, left)


def least_gpu_time_mix(work: Work) -> tuple[int, ...]:
    """The degree, or the two adjacent ones (narrower first), with which the remaining steps end by the deadline at the
    least GPU-time; the widest where none is fast enough."""
    table = work.table
    needed_s = (work.due_s - work.start_s) / work.remaining
    for i, degree in enumerate(table.degrees):
        if table.step_s[degree] <= needed_s:
            return table.degrees[max(i - 1, 0) : i + 1]
    return (table.widest,)


def _narrowest(work: Work) -> tuple[int, ...]:
    return (work.table.narrowest,)


def _can_be_in_time(work: Work) -> bool:
    return work.remaining * work.table.fastest_step_s <= work.due_s - work.start_s


def _saving_degrees(work: Work, next_s: float) -> list[Option]:
    """Degrees of its mix that keep a request from being definitely late at `next_s`, if doing nothing would not."""
    table, remaining = work.table, work.remaining
    if next_s + remaining * table.fastest_step_s <= work.due_s:
        return []
    options = []
    for degree in least_gpu_time_mix(work):
        num_steps = min(remaining, max(1, int((next_s - work.start_s) / table.step_s[degree] + 1e-9)))
        end_s = work.start_s + num_steps * table.step_s[degree]
        if num_steps < remaining:
            end_s = max(end_s, next_s) + (remaining - num_steps) * table.fastest_step_s
        if end_s <= work.due_s:
            options.append((degree, 1.0))
    return options


def _paced_tables(snapshot: Snapshot, length_s: float) -> Tables:
    """Tables whose steps take as long as they do when only whole steps fit in a round."""
    true_tables, tables = snapshot.tables, {}
    for name in {(request.model, request.cost_key) for request in snapshot.all_requests}:
        table = true_tables[name]
        paced = DegreeTable(_paced(table.cost, length_s), table.legal, true_tables.num_devices)
        paced.fastest_step_s = table.fastest_step_s  # "definitely late" is judged by the true step, as published
        tables[name] = paced
    return tables


def _paced(cost: SizeCost, length_s: float) -> SizeCost:
    def pace(step_s: float) -> float:
        fitting = int(length_s * (1 + OVERRUN) / step_s + 1e-9)
        return max(step_s, length_s / fitting) if fitting else length_s * math.ceil(step_s / length_s - OVERRUN)

    paced = {degree: pace(step_s) for degree, step_s in cost.step_by_degree_s.items()}
    return msgspec.structs.replace(cost, step_by_degree_s=paced)


def _begin(builder: RoundBuilder, tables: Tables) -> list[Work]:
    """Start encodes and decodes; the requests that may start a chunk now, most urgent first."""
    snapshot = builder.snapshot
    requests = sorted(snapshot.all_requests, key=lambda request: urgency(request, snapshot.config))
    start_aux(builder, requests)
    works = []
    for request in ready_to_denoise(builder, requests):
        table = tables[request.model, request.cost_key]
        due = denoise_due_s(due_s(request, snapshot.config), table.after_s)
        works.append(Work(request, table, max(snapshot.now_s, request.ready_s), due, True))
    return works


def _start(builder: RoundBuilder, works: Sequence[Work], fitting: Callable[[float, float], int]) -> None:
    """Start every request that has a target, keeping placements. `fitting(step_s, from_s)`: steps for its chunk."""
    starting = []
    for work in works:
        if work.target:
            step_s = builder.snapshot.costs.cost(work.view.model, work.view.cost_key).step_s(work.target)
            num_steps = max(1, min(fitting(step_s, work.start_s), work.remaining))
            starting.append((work.view, work.target, num_steps))
    builder.start_all(starting)
