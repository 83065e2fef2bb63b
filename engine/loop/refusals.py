"""How long something has been refused without a break, so that nobody waits for ever for what will not come."""

from collections.abc import Hashable, Iterable

FORGET_S = 1.0
"""What was not refused for so long has begun anew."""


class Refusals:
    """Keys are whatever refuses: devices whose ring is full, the slab whose slots are taken."""

    def __init__(self) -> None:
        self._since_and_last_s: dict[Hashable, tuple[float, float]] = {}

    def refused_s(self, key: Hashable, now_s: float) -> float:
        """Refused again; answers for how long."""
        since_s, last_s = self._since_and_last_s.get(key, (now_s, now_s))
        if now_s - last_s > FORGET_S:
            since_s = now_s
        self._since_and_last_s[key] = since_s, now_s
        return now_s - since_s

    def over(self, keys: Iterable[Hashable]) -> None:
        """These have taken something, or are no more."""
        if self._since_and_last_s:
            for key in keys:
                self._since_and_last_s.pop(key, None)
