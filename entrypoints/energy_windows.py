"""Energy of a stretch of time, for benchmarks: `EnergyWindows` over any meter, and Zeus' monitor in the same form."""

import importlib
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from tetrion.engine.energy.meters.base import EnergyMeter, MeterUnavailable, Reading


class WindowEnergy(msgspec.Struct, frozen=True, kw_only=True):
    """Joules by GPU UUID between two moments, None with a `reason` where they are not known."""

    seconds: float
    gpu_j: dict[str, float] | None
    reason: str = ""

    @property
    def total_j(self) -> float | None:
        return None if self.gpu_j is None else sum(self.gpu_j.values())


class EnergyWindows(Protocol):
    """One window at a time."""

    source: str

    def begin(self) -> None: ...

    def end(self) -> WindowEnergy: ...


class CounterWindows:
    """Differences of a meter's counters. `now_s` measures the window's length where the meter knows nothing."""

    def __init__(self, meter: EnergyMeter, now_s: Callable[[], float] = time.monotonic) -> None:
        self.source = meter.source
        self._meter = meter
        self._now_s = now_s
        self._begun: tuple[float, Reading] | None = None

    def begin(self) -> None:
        self._begun = self._now_s(), self._meter.read()

    def end(self) -> WindowEnergy:
        assert self._begun is not None, "end() before begin()"
        (start_s, first), last = self._begun, self._meter.read()
        seconds = self._now_s() - start_s
        reason = self._meter.reason
        if reason or not self._meter.uuids:
            return WindowEnergy(
                seconds=seconds, gpu_j=None, reason=reason or f"the meter {self.source!r} has no counters"
            )
        gpu_j = {}
        for uuid in self._meter.uuids:
            if uuid not in first.joules or uuid not in last.joules:
                return WindowEnergy(seconds=seconds, gpu_j=None, reason=f"{uuid} did not tell its counter")
            gpu_j[uuid] = last.joules[uuid] - first.joules[uuid]
            if gpu_j[uuid] < 0:
                return WindowEnergy(seconds=seconds, gpu_j=None, reason=f"the counter of {uuid} went backwards")
        return WindowEnergy(seconds=last.time_s - first.time_s, gpu_j=gpu_j)


class ZeusWindows:
    """`ZeusMonitor` of the package zeus (0.16). Raises MeterUnavailable where it is not installed.

    Keys are unique, nothing is synchronised on the device, GPUs are named by index. A monitor without GPUs reports a
    total of 0: that is None here.
    """

    source = "zeus"

    def __init__(self, gpus: Sequence[tuple[int, str]], monitor_class: Callable[..., Any] | None = None) -> None:
        """`gpus`: (index as Zeus counts, UUID)."""
        make = monitor_class or _import_monitor()
        self._gpus = tuple(gpus)
        indices = [index for index, _ in self._gpus]
        try:
            self._monitor = make(gpu_indices=indices, cpu_indices=[], approx_instant_energy=False)
        except Exception as error:  # Zeus raises its own kinds, and KeyError or OSError from what it loads
            raise MeterUnavailable(f"Zeus does not start: {error!r}") from None
        self._numbers = itertools.count(1)
        self._open = ""

    def begin(self) -> None:
        self._open = f"tetrion-{id(self)}-{next(self._numbers)}"
        self._monitor.begin_window(self._open, sync_execution=False)

    def end(self) -> WindowEnergy:
        measured = self._monitor.end_window(self._open, sync_execution=False)
        names = dict(self._gpus)
        if not measured.gpu_energy or set(measured.gpu_energy) != set(names):
            return WindowEnergy(seconds=measured.time, gpu_j=None, reason="Zeus measured no energy of these GPUs")
        gpu_j = {names[index]: float(joules) for index, joules in measured.gpu_energy.items()}
        return WindowEnergy(seconds=measured.time, gpu_j=gpu_j)


def _import_monitor() -> Any:
    try:
        return importlib.import_module("zeus.monitor").ZeusMonitor
    except ImportError:
        raise MeterUnavailable("zeus is not installed; pip install zeus") from None
    except Exception as error:  # zeus-ml, its frozen old name, raises KeyError on a machine without a GPU
        raise MeterUnavailable(f"zeus cannot be imported: {error!r}") from None
