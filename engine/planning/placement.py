"""Which devices a request gets, once its degree is known. Deterministic; previous members stay, and stay in order, so
that rank 0 keeps the state that the others would pull from it."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

NO_CLAIMS: frozenset[int] = frozenset()


def choose_members(
    previous: Sequence[int],
    degree: int,
    idle: Iterable[int],
    order: Callable[[int], Any],
    claimed: Collection[int] = NO_CLAIMS,
) -> tuple[int, ...]:
    """`degree` of the `idle` devices in rank order: first previous members in their order, then newcomers: unclaimed
    ones first (`claimed` holds devices that others would like to keep), then by `order`, then by id.

    Raises ValueError if fewer than `degree` devices are idle.
    """
    available = set(idle)
    if degree > len(available):
        raise ValueError(f"degree {degree} does not fit on {len(available)} idle devices")
    kept = [device for device in previous if device in available][:degree]
    if len(kept) == degree:
        return tuple(kept)
    newcomers = sorted(available.difference(kept), key=lambda device: (device in claimed, order(device), device))
    return tuple(kept + newcomers[: degree - len(kept)])
