"""Joules of the stages that `tetrion profile` measures: each fills a window between two readings of the counters.

Only the GPUs that work are counted. Counters move every ~100 ms, so that a window lasts some seconds however short the
stage is. What is not known is None, and `reason` says why.
"""

import math
from collections.abc import Awaitable, Callable, Mapping

from tetrion.engine.energy.meters.base import EnergyMeter
from tetrion.engine.measure.probe import Members, Probe, Size
from tetrion.entrypoints.energy_windows import CounterWindows, WindowEnergy

WINDOW_S = 5.0


class StageMeter:
    """`uuids`: device id → UUID of its GPU, empty where devices are CPUs."""

    def __init__(self, probe: Probe, meter: EnergyMeter, uuids: Mapping[int, str], window_s: float = WINDOW_S) -> None:
        self.source = meter.source
        self.reason = meter.reason or ("" if uuids else "the devices are CPUs")
        self._probe = probe
        self._windows = CounterWindows(meter)
        self._uuids = uuids
        self._window_s = window_s

    async def step_j(self, size: Size, members: Members, num_steps: int, step_s: float) -> float | None:
        """Joules of one denoising step over all members: chunks of `num_steps` steps, one queued behind the other."""
        if self.reason:
            return None
        count = math.ceil(self._window_s / (num_steps * step_s))
        self._windows.begin()
        await self._probe.runs(size, num_steps, (members, num_steps), count)
        return self._share(self._windows.end(), members, count * num_steps)

    async def repeated_j(self, stage: Callable[[], Awaitable[object]], device_id: int, seconds: float) -> float | None:
        """Joules of a stage on one device that takes `seconds`, the moments between two of them included."""
        if self.reason:
            return None
        count = math.ceil(self._window_s / max(seconds, 1e-3))
        self._windows.begin()
        for _ in range(count):
            await stage()
        return self._share(self._windows.end(), (device_id,), count)

    def _share(self, window: WindowEnergy, members: Members, count: int) -> float | None:
        gpus = {self._uuids[device_id] for device_id in members}
        if window.gpu_j is None or not gpus <= window.gpu_j.keys():
            self.reason = window.reason or "a GPU did not tell its counter"
            return None
        return sum(window.gpu_j[uuid] for uuid in gpus) / count
