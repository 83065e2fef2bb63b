"""How soon a worker that died is started again, and when it is given up. Arithmetic only: it is told the time."""

import math
from collections import defaultdict

from tetrion.engine.recovery import MAX_ATTEMPTS

MAX_DEATHS = MAX_ATTEMPTS + 1
"""More than one request's attempts: a request that kills every worker it meets must not cost the engine one."""
WINDOW_S = 60.0
PAUSE_S = 1.0
"""Grows with every death: what killed the worker (the system's want of memory, say) may need time to pass."""


class RespawnPolicy:
    """Counts the deaths of each worker within `window_s`, and all since it was last ready, however long ago."""

    def __init__(self, max_deaths: int = MAX_DEATHS, window_s: float = WINDOW_S, pause_s: float = PAUSE_S) -> None:
        self._max_deaths, self._window_s, self._pause_s = max_deaths, window_s, pause_s
        self._deaths_s: defaultdict[int, list[float]] = defaultdict(list)
        self._ready_s: dict[int, float] = {}

    def ready(self, device_id: int, now_s: float) -> None:
        """The worker has come up."""
        self._ready_s[device_id] = now_s

    def died(self, device_id: int, now_s: float) -> float | None:
        """Seconds until the worker is to be started again; None if it is given up."""
        window_s, ready_s = now_s - self._window_s, self._ready_s.get(device_id, -math.inf)
        earlier = [time_s for time_s in self._deaths_s[device_id] if time_s >= window_s or time_s > ready_s]
        deaths = self._deaths_s[device_id] = [*earlier, now_s]
        return None if len(deaths) >= self._max_deaths else self._pause_s * (len(deaths) - 1)
