"""Which requests can still meet their deadlines together, and the least degree each needs: an earliest-deadline fill of
the free profile, dropping the largest when something does not fit. Pure arithmetic on `Work` items."""

import math
from collections.abc import Callable, Mapping, Sequence

from tetrion.engine.planning.degrees import DegreeTable
from tetrion.engine.planning.free_profile import FreeProfile, State
from tetrion.engine.planning.snapshot import RequestView

FILLS_PER_WORK = 6
RESERVE = 0.1
"""Share of the time until it is due that a request which nothing widens keeps in reserve."""


class Work:
    """One request's remaining denoising while a plan is made (changed only by the plan that made it).

    `start_s`: when it can go on; `due_s`: when denoising must be done; `degrees`: those it may need, ascending;
    `level`: the degree it needs (0: not placed); `target`: the degree it gets next (0: none); `is_ready`: it may be
    assigned now.
    """

    __slots__ = (
        "degrees",
        "due_s",
        "is_late",
        "is_ready",
        "is_soft",
        "level",
        "remaining",
        "start_s",
        "table",
        "target",
        "view",
    )

    def __init__(self, view: RequestView, table: DegreeTable, start_s: float, due_s: float, is_ready: bool) -> None:
        self.view = view
        self.table = table
        self.start_s = start_s
        self.due_s = due_s
        self.is_ready = is_ready
        self.degrees: Sequence[int] = table.degrees
        self.remaining = view.num_steps - view.step_index
        self.is_soft = view.deadline_s is None
        self.is_late = not self.is_soft and self.remaining * table.fastest_step_s > due_s - start_s
        self.level = 0
        self.target = 0


def work_left(work: Work) -> float:
    """Remaining GPU-seconds per unit of weight: what dropping the request gains the others."""
    return work.remaining * work.table.work_s / work.view.weight


def fraction_left(work: Work) -> float:
    """Remaining share of its own steps per unit of weight, whatever its size: what is nearly done is kept."""
    return work.remaining / (work.view.num_steps * work.view.weight)


DROP_FIRST: Mapping[str, Callable[[Work], float]] = {"work": work_left, "fraction": fraction_left}
"""By name (`HorizonOptions.drop`): the larger of two is dropped."""


def place(profile: FreeProfile, work: Work, due_s: float) -> bool:
    """Take the least level that ends by `due_s` out of the profile and set `work.level`; False if none does. Unless it
    is to be fastest, a wider level that takes less joules is better than that.

    A wider level never ends later, so the least one is found by halving between one that is too slow and one that
    is not.
    """
    table, remaining, start_s = work.table, work.remaining, work.start_s
    degrees, step_s, budget_s = work.degrees, table.step_s, due_s - start_s
    low, high = 0, len(degrees) - 1
    while remaining * step_s[degrees[low]] > budget_s:
        low += 1
        if low > high:
            return False
    saves_energy = work.view.energy_mode != "fastest" and bool(table.step_j)
    if not saves_energy and profile.take(table, degrees[low], start_s, remaining, due_s):
        work.level = degrees[low]
        return True

    def is_in_time(i: int) -> bool:
        return profile.finish_s(table, degrees[i], start_s, remaining, due_s) < math.inf

    if saves_energy and is_in_time(low):
        high = low
    elif low == high or not is_in_time(high):
        return False
    while high - low > 1:
        middle = (low + high) // 2
        if is_in_time(middle):
            high = middle
        else:
            low = middle
    work.level = min(degrees[high:], key=table.step_j.__getitem__) if saves_energy else degrees[high]
    return profile.take(table, work.level, start_s, remaining, due_s)


def place_early(profile: FreeProfile, work: Work) -> bool:
    """As `place`, with time in reserve: what nothing widens once more would end just before its deadline, and miss it
    whenever something gets in its way. False for who is to be fastest, since left-over devices widen it."""
    if work.view.energy_mode == "fastest" or not work.table.step_j:
        return False
    return place(profile, work, work.due_s - RESERVE * (work.due_s - work.start_s))


def fill(
    profile: FreeProfile, candidates: Sequence[Work], drop_first: Callable[[Work], float] = work_left
) -> list[Work]:
    """Place the candidates (earliest deadline first); returns those dropped, whose level stays 0.

    When one does not fit, the one with the largest `drop_first` of those placed so far and itself is dropped, and the
    fill resumes at the dropped one's position. A bounded number of placements is tried; after that whatever does not
    fit is dropped.
    """
    for work in candidates:
        work.level = 0
    before: list[State | None] = [None] * len(candidates)
    loads = [drop_first(work) for work in candidates]
    dropped: list[int] = []
    tries = FILLS_PER_WORK * len(candidates)
    i = 0
    while i < len(candidates):
        if loads[i] < 0:
            i += 1
            continue
        before[i] = profile.save()
        tries -= 1
        if place_early(profile, candidates[i]) or place(profile, candidates[i], candidates[i].due_s):
            i += 1
            continue
        victim = _largest(loads, i) if tries > 0 else i
        dropped.append(victim)
        loads[victim] = -1.0
        if victim < i:
            state = before[victim]
            assert state is not None
            profile.restore(state)
            for work in candidates[victim:i]:
                work.level = 0
        i = victim + 1
    return [candidates[i] for i in sorted(dropped)]


def _largest(loads: Sequence[float], last: int) -> int:
    """Index of the largest of `loads[:last + 1]`, the last of equals."""
    largest = max(loads[: last + 1])
    return next(i for i in range(last, -1, -1) if loads[i] == largest)
