"""Requests that can still meet their deadlines: in the order of these, with the work of those before, and when each
turns late.

A request turns late at its *latest start*: its deadline less what it needs on idle devices. So those that do so next
are on top of a heap; entries that hold no longer are left in it until they come up, or outnumber the others. Every
operation costs O(log n), but for moving what lies behind in a list, and adding up numbers: a few µs with thousands.
"""

import heapq
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")
Rank = tuple[float, float, str]
"""Deadline in seconds, priority (less is first), request id."""
MAX_STALE = 64
"""Entries of the heap that do not hold, beside as many as there are that do."""


class Feasible(Generic[T]):
    """Things (requests) with a rank that is like that of no other, in ascending order."""

    def __init__(self) -> None:
        self._ranks: list[Rank] = []
        self._things: list[T] = []
        self._dues_s, self._works_s, self._loads = array("d"), array("d"), array("d")
        """Of each its deadline, its work in device seconds, and that per unit of weight."""
        self._latest_s: dict[Rank, float] = {}
        self._heap: list[tuple[float, Rank]] = []

    def __len__(self) -> int:
        return len(self._ranks)

    def put(self, rank: Rank, thing: T, latest_s: float, work_s: float, weight: float = 1.0) -> None:
        """Add it, or change what is known of it. `latest_s`: its latest start; `work_s`: device seconds."""
        i = bisect_left(self._ranks, rank)
        if rank not in self._latest_s:
            self._ranks.insert(i, rank)
            self._things.insert(i, thing)
            self._dues_s.insert(i, rank[0])
            self._works_s.insert(i, work_s)
            self._loads.insert(i, work_s / weight)
        self._works_s[i], self._loads[i] = work_s, work_s / weight
        if self._latest_s.get(rank) != latest_s:
            self._latest_s[rank] = latest_s
            heapq.heappush(self._heap, (latest_s, rank))
            self._sweep()

    def remove(self, rank: Rank) -> None:
        """If it is there."""
        if self._latest_s.pop(rank, None) is not None:
            i = bisect_left(self._ranks, rank)
            del self._ranks[i], self._things[i], self._dues_s[i], self._works_s[i], self._loads[i]
            self._sweep()

    def take_late(self, now_s: float) -> Iterator[T]:
        """Take out those whose latest start is past, earliest first."""
        while self._heap and self._heap[0][0] < now_s:
            latest_s, rank = heapq.heappop(self._heap)
            if self._latest_s.get(rank) == latest_s:
                thing = self._things[bisect_left(self._ranks, rank)]
                self.remove(rank)
                yield thing

    def around(self, rank: Rank, num_before: int, num_after: int) -> tuple[list[T], float]:
        """So many before this rank and so many after it, in order; and the device seconds of all that come before
        these."""
        i = bisect_left(self._ranks, rank)
        first = max(0, i - num_before)
        return self._things[first : i + num_after], sum(self._works_s[:first])

    def crowded_until_s(
        self, rank: Rank, num_after: int, work_s: float, weight: float, now_s: float, num_devices: int
    ) -> float | None:
        """With so much work at this rank, can those behind the `num_after` after it still be in time, if every device
        is busy? None: yes, or one with more work would rather be given up. Else the time at which the work is done of
        all that come before the last one that cannot."""
        first = bisect_left(self._ranks, rank) + num_after
        if first >= len(self._ranks):
            return None
        ends_s = now_s + (np.cumsum(self._works_s)[first:] + work_s) / num_devices
        is_largest = work_s / weight >= np.maximum.accumulate(self._loads)[first:]
        crowded = np.flatnonzero((ends_s > np.asarray(self._dues_s)[first:]) & is_largest)
        return float(ends_s[crowded[-1]]) if len(crowded) else None

    def _sweep(self) -> None:
        if len(self._heap) > 2 * len(self._latest_s) + MAX_STALE:
            self._heap = [(latest_s, rank) for rank, latest_s in self._latest_s.items()]
            heapq.heapify(self._heap)
