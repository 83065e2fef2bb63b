"""What to do with devices that no deadline needs: a group knapsack over wider degrees. Pure arithmetic."""

from collections.abc import Sequence

from tetrion.engine.planning.forward_fill import Work

Option = tuple[int, float]
"""A degree and what it is worth beyond the current target."""


def gain(work: Work, degree: int) -> float:
    """Throughput gained by going from the target to `degree`, in units of the request's narrowest degree."""
    return work.table.speed[degree] - work.table.speed[work.target]


def widen_whoever_gains(works: Sequence[Work], num_left: int) -> None:
    """Raise targets with so many devices as the throughput gained is largest."""
    wider = [
        (work, [(d, gain(work, d)) for d in work.table.degrees if work.target < d <= work.target + num_left])
        for work in works
    ]
    widen([(work, options) for work, options in wider if options], num_left)


def widen(items: Sequence[tuple[Work, list[Option]]], num_left: int) -> int:
    """Raise targets so that the summed worth is largest within `num_left` devices (ties: earlier items, narrower
    degrees). Returns how many devices are still left."""
    if num_left <= 0 or not items:
        return num_left
    best = [0.0] * (num_left + 1)
    taken: list[list[int]] = []
    for work, options in items:
        choice = [0] * (num_left + 1)
        previous = best
        best = previous.copy()
        for degree, worth in options:
            extra = degree - work.target
            for room in range(extra, num_left + 1):
                value = previous[room - extra] + worth
                if value > best[room] + 1e-12:
                    best[room] = value
                    choice[room] = degree
        taken.append(choice)
    room = num_left
    for (work, _), choice in zip(reversed(items), reversed(taken), strict=True):
        degree = choice[room]
        if degree:
            room -= degree - work.target
            work.target = degree
    return room
