"""The sampler's thread."""

import time
from collections.abc import Callable

import pytest

from tetrion.engine.energy.meters.base import NoMeter, Reading
from tetrion.engine.energy.sampler import Pace, Sampler


def within(seconds: float, is_so: Callable[[], bool]) -> bool:
    end_s = time.monotonic() + seconds
    while not is_so() and time.monotonic() < end_s:
        time.sleep(0.01)
    return is_so()


class Ticking(NoMeter):
    source, reason = "ticking", ""

    def __init__(self) -> None:
        self.is_closed = False

    def read(self, counters: bool = True) -> Reading:
        return Reading(time_s=time.monotonic(), joules={"GPU-0": 0.0} if counters else {}, watts={})

    def close(self) -> None:
        self.is_closed = True


def test_the_sampler_reads_until_it_is_stopped_and_knows_its_cost() -> None:
    readings: list[Reading] = []
    meter = Ticking()
    sampler = Sampler(meter, readings.append, period_s=0.02)
    sampler.start()
    assert within(5, lambda: len(readings) >= 5)
    sampler.stop()
    num = len(readings)
    time.sleep(0.06)
    assert len(readings) == num == sampler.cost.num_readings
    assert readings[0].joules
    assert 0 < sampler.cost.cpu_s < sampler.cost.wall_s
    assert meter.is_closed


def test_a_meter_that_tells_power_alone_tells_no_joules() -> None:
    class PowerOnly(Ticking):
        def read(self, counters: bool = True) -> Reading:
            return Reading(time_s=time.monotonic(), joules={}, watts={"GPU-0": 500.0})

    readings: list[Reading] = []
    sampler = Sampler(PowerOnly(), readings.append, period_s=0.02)
    assert sampler.age_s is None
    sampler.start()
    begun_s = time.monotonic()
    assert within(5, lambda: len(readings) >= 5)
    sampler.stop()
    assert sampler.age_s is not None and sampler.age_s >= time.monotonic() - begun_s - 0.01


@pytest.mark.parametrize(("cpu_ms", "period_s"), [(0.1, 0.1), (0.6, 0.3), (8.2, 0.5)])
def test_powers_are_read_as_seldom_as_their_cost_demands(cpu_ms: float, period_s: float) -> None:
    pace = Pace(0.1)
    assert pace.period_s == 0.1
    for number in range(7):
        pace.took(counters=False, cpu_s=cpu_ms / 1e3, now_s=float(number))
    assert pace.period_s == pytest.approx(period_s)


@pytest.mark.parametrize(("cpu_ms", "distance_s"), [(0.1, 0.05), (8.4, 4.2), (34.0, 10.0)])
def test_counters_are_read_at_once_and_then_as_seldom_as_their_cost_demands(cpu_ms: float, distance_s: float) -> None:
    pace = Pace(0.1)
    assert pace.with_counters(7.0)
    pace.took(counters=True, cpu_s=cpu_ms / 1e3, now_s=7.0)
    assert not pace.with_counters(7.0 + 0.99 * distance_s) and pace.with_counters(7.0 + 1.01 * distance_s)
    assert pace.period_s == 0.1


def test_a_sampler_whose_receiver_fails_ends_alone() -> None:
    def fail(_: Reading) -> None:
        raise ZeroDivisionError

    meter = Ticking()
    sampler = Sampler(meter, fail, period_s=0.02)
    sampler.start()
    assert within(5, lambda: not sampler._thread.is_alive())
    sampler.stop()
    assert meter.is_closed
