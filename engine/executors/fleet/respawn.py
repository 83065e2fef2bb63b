"""How soon a worker that died is started again. Nobody is given up. Arithmetic only: it is told the time."""

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 60.0
"""Pauses double up to this: what killed the worker (the system's want of memory, say) may need time to pass."""
LONGEST_REFUSED_PAUSE_S = 4.0
"""To try costs nothing where there was no process; and when there is room again, requests have waited long enough."""
SERVED_S = 10.0
"""Who served that long before it died is not in trouble: its earlier deaths are forgotten."""


class RespawnPolicy:
    """Counts the deaths of each worker since it last served for `SERVED_S`."""

    def __init__(self) -> None:
        self._num_deaths: dict[int, int] = {}
        self._num_refusals: dict[int, int] = {}
        self._ready_s: dict[int, float] = {}

    def ready(self, device_id: int, now_s: float) -> None:
        """The worker has come up."""
        self._ready_s[device_id] = now_s
        self._num_refusals.pop(device_id, None)

    def died(self, device_id: int, now_s: float) -> float:
        """Seconds until the worker is to be started again."""
        ready_s = self._ready_s.pop(device_id, None)
        if ready_s is not None and now_s - ready_s >= SERVED_S:
            self._num_deaths.pop(device_id, None)
        num_before = self._num_deaths.get(device_id, 0)
        self._num_deaths[device_id] = num_before + 1
        return _pause_s(num_before, LONGEST_PAUSE_S)

    def refused(self, device_id: int) -> float:
        """There was no room for a process (no descriptor, no memory): seconds until it is to be tried again."""
        num_before = self._num_refusals.get(device_id, 0)
        self._num_refusals[device_id] = num_before + 1
        return _pause_s(num_before, LONGEST_REFUSED_PAUSE_S)


def _pause_s(num_before: int, longest_s: float) -> float:
    return min(longest_s, FIRST_PAUSE_S * 2.0 ** min(num_before, 10))
