"""Reads a meter in a thread of its own: ten times a second, or as seldom as its cost demands."""

import logging
import threading
import time
from collections.abc import Callable

import msgspec

from tetrion.engine.energy.meter import EnergyMeter, Reading

logger = logging.getLogger(__name__)
PERIOD_S, LONGEST_PERIOD_S = 0.1, 0.5
CORE_SHARE = 0.004
"""What the thread may take of a core, unless even the longest period takes more."""


class SamplerCost(msgspec.Struct, frozen=True, kw_only=True):
    """`cpu_s` of the thread, what it did with the readings included, over `wall_s`."""

    num_readings: int
    cpu_s: float
    wall_s: float

    @property
    def core_share(self) -> float:
        return self.cpu_s / self.wall_s if self.wall_s > 0 else 0.0

    def period_s(self, shortest_s: float) -> float:
        """Between two readings, so that their cost stays within `CORE_SHARE`."""
        cheap_s = self.cpu_s / self.num_readings / CORE_SHARE if self.num_readings else shortest_s
        return min(max(shortest_s, cheap_s), max(shortest_s, LONGEST_PERIOD_S))


class Sampler:
    """`receive` is called in the sampler's thread with every reading. Start it, `stop` it; it closes the meter."""

    def __init__(self, meter: EnergyMeter, receive: Callable[[Reading], None], period_s: float = PERIOD_S) -> None:
        self._meter, self._receive, self._period_s = meter, receive, period_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tetrion-energy", daemon=True)
        self._cost = SamplerCost(num_readings=0, cpu_s=0.0, wall_s=0.0)
        self._told_s: float | None = None

    @property
    def cost(self) -> SamplerCost:
        return self._cost

    @property
    def age_s(self) -> float | None:
        """Seconds since a reading has last told joules, or since the start; None before that."""
        return None if self._told_s is None else time.monotonic() - self._told_s

    def start(self) -> None:
        self._told_s = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        self._meter.close()

    def _run(self) -> None:
        started_s, started_cpu_s, number = time.monotonic(), time.thread_time(), 0
        try:
            while not self._stopping.wait(self._cost.period_s(self._period_s)):
                reading = self._meter.read()
                self._receive(reading)
                number += 1
                if reading.joules:
                    self._told_s = time.monotonic()
                self._cost = SamplerCost(
                    num_readings=number,
                    cpu_s=time.thread_time() - started_cpu_s,
                    wall_s=time.monotonic() - started_s,
                )
        except Exception:  # metering must not take the engine with it; receipts will lack readings and say so
            logger.exception("the energy sampler ended")
