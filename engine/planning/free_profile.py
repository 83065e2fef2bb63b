"""How many devices are free over time: a step function that the forward fill takes requests out of.

It counts devices, it does not name them; who gets which is `placement`'s business.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable

from tetrion.engine.planning.degrees import DegreeTable

State = tuple[list[float], list[int]]


class FreeProfile:
    """`free[i]` devices are free in [times[i], times[i + 1]), the last interval being endless. Neighbours differ.

    times   now      t1       t2            t3
    free     2   |   4    |    1     |      8   …
    """

    __slots__ = ("free", "times")

    def __init__(self, now_s: float, free_s: Iterable[float]) -> None:
        """`free_s`: when each device becomes free (now or earlier: at once)."""
        self.times = [now_s]
        self.free = [0]
        for time_s in sorted(free_s):
            if time_s <= now_s or time_s == self.times[-1]:
                self.free[-1] += 1
            else:
                self.times.append(time_s)
                self.free.append(self.free[-1] + 1)

    def save(self) -> State:
        """A copy to `restore` later."""
        return self.times.copy(), self.free.copy()

    def restore(self, state: State) -> None:
        self.times, self.free = state[0].copy(), state[1].copy()

    def finish_s(self, table: DegreeTable, level: int, start_s: float, num_steps: float, due_s: float) -> float:
        """When a malleable request ends that from `start_s` on always uses the widest useful degree that is at most
        `level` and free; infinity if that is after `due_s`. Steps count as divisible."""
        times, free, largest, step_s = self.times, self.free, table.largest, table.step_s
        i = max(bisect_right(times, start_s) - 1, 0)
        last = len(times) - 1
        time_s = max(start_s, times[i])
        while True:
            available = free[i]
            degree = largest[available if available < level else level]
            if degree:
                end_s = time_s + num_steps * step_s[degree]
                if i == last or end_s <= times[i + 1]:
                    return end_s if end_s <= due_s else math.inf
                num_steps -= (times[i + 1] - time_s) / step_s[degree]
            elif i == last:
                return math.inf
            i += 1
            time_s = times[i]
            if time_s > due_s:
                return math.inf

    def take(self, table: DegreeTable, level: int, start_s: float, num_steps: float, due_s: float) -> bool:
        """Subtract what such a request uses (see `finish_s`). False, with nothing changed, if it ends after `due_s`."""
        times, free, largest, step_s = self.times, self.free, table.largest, table.step_s
        first = i = max(bisect_right(times, start_s) - 1, 0)
        last = len(times) - 1
        time_s = start_s if start_s > times[i] else times[i]
        left: list[int] = []
        while True:
            available = free[i]
            degree = largest[available if available < level else level]
            left.append(available - degree)
            if degree:
                end_s = time_s + num_steps * step_s[degree]
                if i == last or end_s <= times[i + 1]:
                    break
                num_steps -= (times[i + 1] - time_s) / step_s[degree]
            elif i == last:
                return False
            i += 1
            time_s = times[i]
            if time_s > due_s:
                return False
        if end_s > due_s:
            return False
        if i == last or end_s < times[i + 1]:
            times.insert(i + 1, end_s)
            free.insert(i + 1, free[i])
        if start_s > times[first]:
            times.insert(first + 1, start_s)
            free.insert(first + 1, free[first])
            first, i = first + 1, i + 1
        free[first : i + 1] = left
        self._merge(first, i + 1)
        return True

    def take_devices(self, count: int, start_s: float, end_s: float) -> None:
        """Subtract up to `count` devices in [start_s, end_s)."""
        first, last = self._cut(start_s), self._cut(end_s)
        for i in range(first, last):
            self.free[i] = max(0, self.free[i] - count)
        self._merge(first, last)

    def _merge(self, first: int, last: int) -> None:
        """Make one of neighbouring intervals with equally many devices, where `first` to `last` have changed: in a full
        profile most have none, and every walk passes over them."""
        times, free = self.times, self.free
        for i in range(last, max(first, 1) - 1, -1):
            if free[i] == free[i - 1]:
                del times[i], free[i]

    def _cut(self, time_s: float) -> int:
        """Index of the interval that begins at `time_s`, made if there is none."""
        times = self.times
        if time_s <= times[0]:
            return 0
        i = bisect_left(times, time_s)
        if i == len(times) or times[i] != time_s:
            times.insert(i, time_s)
            self.free.insert(i, self.free[i - 1])
        return i
