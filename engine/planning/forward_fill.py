"""Which requests can still meet their deadlines together, and the least degree each needs: an earliest-deadline fill of
the free profile, dropping the largest when something does not fit. Pure arithmetic on `Work` items."""

import math
from collections.abc import Sequence

from tetrion.engine.planning.degrees import DegreeTable
from tetrion.engine.planning.free_profile import FreeProfile, State
from tetrion.engine.planning.snapshot import RequestView

FILLS_PER_WORK = 6


class Work:
    """One request's remaining denoising while a plan is made (changed only by the plan that made it).

    `start_s`: when it can go on; `due_s`: when denoising must be done; `level`: the degree it needs (0: not placed);
    `target`: the degree it gets next (0: none); `is_ready`: it may be assigned now.
    """

    __slots__ = ("due_s", "is_late", "is_ready", "is_soft", "level", "remaining", "start_s", "table", "target", "view")

    def __init__(self, view: RequestView, table: DegreeTable, start_s: float, due_s: float, is_ready: bool) -> None:
        self.view = view
        self.table = table
        self.start_s = start_s
        self.due_s = due_s
        self.is_ready = is_ready
        self.remaining = view.num_steps - view.step_index
        self.is_soft = view.deadline_s is None
        self.is_late = not self.is_soft and self.remaining * table.fastest_step_s > due_s - start_s
        self.level = 0
        self.target = 0

    @property
    def size(self) -> float:
        """What dropping it gains: remaining GPU-seconds per unit of weight."""
        return self.remaining * self.table.work_s / self.view.weight


def place(profile: FreeProfile, work: Work, due_s: float) -> bool:
    """Take the least level that ends by `due_s` out of the profile and set `work.level`; False if none does."""
    table, budget_s = work.table, due_s - work.start_s
    for level in table.degrees:
        if work.remaining * table.step_s[level] > budget_s:
            continue
        end_s = profile.finish_s(table, level, work.start_s, work.remaining, due_s)
        if end_s < math.inf:
            profile.take(table, level, work.start_s, end_s)
            work.level = level
            return True
    return False


def fill(profile: FreeProfile, candidates: Sequence[Work]) -> list[Work]:
    """Place the candidates (earliest deadline first); returns those dropped, whose level stays 0.

    When one does not fit, the largest of those placed so far and itself is dropped, and the fill resumes at the
    dropped one's position. A bounded number of placements is tried; after that whatever does not fit is dropped.
    """
    for work in candidates:
        work.level = 0
    before: list[State | None] = [None] * len(candidates)
    dropped: set[int] = set()
    tries = FILLS_PER_WORK * len(candidates)
    i = 0
    while i < len(candidates):
        if i in dropped:
            i += 1
            continue
        before[i] = profile.save()
        tries -= 1
        if place(profile, candidates[i], candidates[i].due_s):
            i += 1
            continue
        victim = _largest(candidates, i, dropped) if tries > 0 else i
        dropped.add(victim)
        state = before[victim]
        assert state is not None
        profile.restore(state)
        for work in candidates[victim : i + 1]:
            work.level = 0
        i = victim + 1
    return [candidates[i] for i in sorted(dropped)]


def fill_soft(profile: FreeProfile, works: Sequence[Work]) -> None:
    """Place requests without SLO, in order, nobody dropped: at the least level that ends by the soft deadline, else at
    the narrowest whenever that ends."""
    for work in works:
        if not place(profile, work, work.due_s):
            place(profile, work, math.inf)


def _largest(candidates: Sequence[Work], last: int, dropped: set[int]) -> int:
    sizes = ((candidates[i].size, i) for i in range(last + 1) if i not in dropped)
    return max(sizes)[1]
