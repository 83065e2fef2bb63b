"""Reads a meter in a thread of its own: powers ten times a second and counters with every reading, or as seldom as
what each costs demands.
"""

import logging
import math
import threading
import time
from collections.abc import Callable

import msgspec

from tetrion.engine.energy.meters.base import EnergyMeter, Reading

logger = logging.getLogger(__name__)
PERIOD_S = 0.1
CORE_SHARE = 0.002
"""What readings with counters may take of a core, and likewise those without, unless even the longest period takes
more."""
LONGEST_PERIOD_S, LONGEST_COUNTERS_S = 0.5, 10.0


class SamplerCost(msgspec.Struct, frozen=True):
    """`cpu_s` of the thread, what it did with the readings included, over `wall_s`."""

    num_readings: int
    cpu_s: float
    wall_s: float

    @property
    def core_share(self) -> float:
        return self.cpu_s / self.wall_s if self.wall_s > 0 else 0.0


class Pace:
    """When readings are due, from what earlier ones took. Times are CLOCK_MONOTONIC seconds."""

    def __init__(self, shortest_s: float = PERIOD_S) -> None:
        self.period_s = shortest_s
        """Until the next reading."""
        self._shortest_s = shortest_s
        self._counters_due_s = -math.inf
        self._num_powers, self._powers_cpu_s = 0, 0.0

    def with_counters(self, now_s: float) -> bool:
        """Whether the reading at `now_s` should have the counters too."""
        return now_s >= self._counters_due_s

    def took(self, counters: bool, cpu_s: float, now_s: float) -> None:
        """A reading, with what came of it and the wait before it, took `cpu_s` of a core."""
        if counters:
            self._counters_due_s = now_s + min(cpu_s / CORE_SHARE, LONGEST_COUNTERS_S)
            return
        self._num_powers += 1
        self._powers_cpu_s += cpu_s
        cheap_s = self._powers_cpu_s / self._num_powers / CORE_SHARE
        self.period_s = max(self._shortest_s, min(cheap_s, LONGEST_PERIOD_S))


class Sampler:
    """`receive` is called in the sampler's thread with every reading. Start it, `stop` it; it closes the meter."""

    def __init__(self, meter: EnergyMeter, receive: Callable[[Reading], None], period_s: float = PERIOD_S) -> None:
        self._meter, self._receive, self._pace = meter, receive, Pace(period_s)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tetrion-energy", daemon=True)
        self._cost = SamplerCost(0, 0.0, 0.0)
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
        started_s, number = time.monotonic(), 0
        started_cpu_s = cpu_s = time.thread_time()
        try:
            while not self._stopping.wait(self._pace.period_s):
                counters = self._pace.with_counters(time.monotonic())
                reading = self._meter.read(counters)
                self._receive(reading)
                number += 1
                now_s, before_s, cpu_s = time.monotonic(), cpu_s, time.thread_time()
                self._pace.took(counters, cpu_s - before_s, now_s)
                if reading.joules:
                    self._told_s = now_s
                self._cost = SamplerCost(number, cpu_s - started_cpu_s, now_s - started_s)
        except Exception:  # metering must not take the engine with it; receipts will lack readings and say so
            logger.exception("the energy sampler ended")
