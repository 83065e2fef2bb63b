"""Conservation: whatever ran and whatever was read, what is given out is what the counter moved by."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrion.engine.energy.gpu_ledger import GpuLedger, Settled
from tetrion.engine.energy.quantum import Quantum, Share

PERIOD_S = 0.1
WATTS = st.floats(0, 1500)


def share(request_id: str = "a") -> Share:
    return Share(request_id, "denoise", "tiny", "1024x1024")


def quantum(
    start_s: float, end_s: float, request_id: str = "a", weight: float = 1.0, model_j: float | None = None
) -> Quantum:
    return Quantum(start_s, end_s, share(request_id), weight, model_j)


def fed(ledger: GpuLedger, watts: list[float], joules: list[float]) -> GpuLedger:
    for i, (power, counter) in enumerate(zip(watts, joules, strict=True)):
        ledger.read(i * PERIOD_S, counter, power)
    return ledger


def constant(ledger: GpuLedger, watts: float, seconds: float, scale: float = 1.0) -> GpuLedger:
    """Readings of a constant power, with a counter that moves `scale` times as fast as the power says."""
    num = round(seconds / PERIOD_S) + 1
    return fed(ledger, [watts] * num, [scale * watts * i * PERIOD_S for i in range(num)])


@st.composite
def quanta(draw: st.DrawFn) -> list[Quantum]:
    found = []
    for _ in range(draw(st.integers(0, 12))):
        start_s = draw(st.floats(-1, 7))
        end_s = start_s + draw(st.floats(0, 4))
        found.append(quantum(start_s, end_s, draw(st.sampled_from("abc")), draw(st.floats(0, 1e6))))
    return found


@given(
    quanta(),
    st.lists(st.tuples(WATTS, st.floats(0, 200), st.booleans()), min_size=52, max_size=70),
    st.booleans(),
    st.booleans(),
)
def test_active_idle_and_unattributed_are_what_the_counter_moved_by(
    work: list[Quantum], readings: list[tuple[float, float, bool]], knows_power: bool, always_knows_counter: bool
) -> None:
    """The counter is known in the last reading and in some or all of those before."""
    ledger, counter_j, settled = GpuLedger(5.0), 0.0, []
    for i, (watts, moved_j, knows_counter) in enumerate(readings):
        counter_j += moved_j if i else 0.0
        known = always_knows_counter or knows_counter or i in (0, len(readings) - 1)
        ledger.read(i * PERIOD_S, counter_j if known else None, watts if knows_power else None)
    for item in work:
        ledger.add(item)
    settled = ledger.settle(math.inf)
    assert len(settled) == 1
    window = settled[0].window
    if counter_j == 0:
        assert window is None or window.raw_active_j == 0  # a counter that stands still beside power is not believed
        return
    assert window is not None
    total_j = math.fsum(settled[0].joules.values()) + window.idle_j + window.unattributed_j
    assert total_j == pytest.approx(window.counter_j, rel=1e-9, abs=1e-9)
    assert window.identity_error <= 1e-9
    assert min(window.idle_j, window.unattributed_j, *settled[0].joules.values(), 0.0) == 0.0


@given(quanta(), st.lists(st.floats(0, 10), max_size=8))
def test_settling_in_pieces_gives_what_settling_at_once_gives(work: list[Quantum], stops: list[float]) -> None:
    def books(until: list[float]) -> list[Settled]:
        ledger = GpuLedger(5.0)
        for item in work:
            ledger.add(item)
        for i in range(101):
            ledger.read(i * PERIOD_S, 50.0 * i, 480.0 + i)
        return [settled for until_s in until for settled in ledger.settle(until_s)]

    at_once, in_pieces = books([math.inf]), books([*sorted(stops), math.inf])
    assert [dict(settled.joules) for settled in in_pieces] == [dict(settled.joules) for settled in at_once]
    assert len(at_once) == 2


def closed(ledger: GpuLedger) -> Settled:
    (settled,) = ledger.settle(math.inf)
    return settled


def test_work_gets_the_power_of_its_time() -> None:
    ledger = constant(GpuLedger(), 500.0, 5.0)
    ledger.add(quantum(1.0, 3.0))
    assert closed(ledger).joules[share()] == pytest.approx(1000.0)


def test_those_who_run_at_once_share_by_weight() -> None:
    ledger = constant(GpuLedger(), 400.0, 5.0)
    ledger.add(quantum(1.0, 2.0, "a", weight=3.0))
    ledger.add(quantum(1.0, 2.0, "b", weight=1.0))
    joules = closed(ledger).joules
    assert joules[share("a")] == pytest.approx(300.0)
    assert joules[share("b")] == pytest.approx(100.0)


def test_within_a_cell_work_has_what_the_profile_says_of_it() -> None:
    ledger = GpuLedger()
    ledger.read(0.0, 0.0, 100.0)
    ledger.read(5.0, 2000.0, 100.0)  # a long cell: the counter tells its power
    ledger.add(quantum(0.0, 1.0, "a", model_j=200.0))
    ledger.add(quantum(1.0, 5.0, "b", model_j=1400.0))
    joules = closed(ledger).joules
    assert joules[share("a")] == pytest.approx(2000 / 8) and joules[share("b")] == pytest.approx(2000 * 7 / 8)
    ledger.read(10.0, 4000.0, 100.0)
    ledger.add(quantum(5.0, 6.0, "a", model_j=200.0))
    ledger.add(quantum(6.0, 10.0, "b"))  # the profile does not know it: time decides
    joules = closed(ledger).joules
    assert joules[share("a")] == pytest.approx(2000 / 5) and joules[share("b")] == pytest.approx(2000 * 4 / 5)


def test_the_counter_has_the_last_word_and_what_was_before_is_kept() -> None:
    ledger = constant(GpuLedger(), 500.0, 5.0, scale=1.1)
    ledger.add(quantum(0.0, 4.5))
    settled = closed(ledger)
    window = settled.window
    assert window is not None
    assert settled.joules[share()] == pytest.approx(4.5 * 550)
    assert (window.raw_active_j, window.raw_unattributed_j) == pytest.approx((4.5 * 500, 0.5 * 500))
    assert window.scale == pytest.approx(1.1)
    assert window.raw_error == pytest.approx(1 - 1 / 1.1)


def test_a_window_beside_next_to_no_work_says_little_of_how_far_power_is_from_the_counter() -> None:
    ledger = GpuLedger()
    assert ledger.drift is None
    moved_j = [10.0] * 50 + [60.0] * 50  # 100 W at first, where power says 50 W; then 600 W, as power says
    for i in range(101):
        ledger.read(i * PERIOD_S, sum(moved_j[:i]), 50.0 if i < 50 else 600.0)
    ledger.settle(math.inf)
    first, second = ledger.windows
    assert first.raw_error is not None and first.raw_error > 0.4 and second.raw_error == pytest.approx(0)
    assert ledger.drift == pytest.approx(2 * first.raw_error * math.sqrt(first.counter_j / 3500))


def test_what_is_drawn_at_first_may_be_of_work_before() -> None:
    ledger = GpuLedger()
    watts = [300.0] * 10 + [100.0] * 5
    for number in range(1, len(watts)):
        fed(ledger, watts[: number + 1], [100.0 * i for i in range(number + 1)])
        ledger.settle(math.inf)
        assert ledger.idle_w is None or ledger.idle_w == pytest.approx(100.0)
    assert ledger.idle_w is not None


def test_power_beside_work_is_unattributed_until_idle_power_was_seen_and_then_only_above_it() -> None:
    ledger = constant(GpuLedger(), 100.0, 5.0)
    first = closed(ledger).window
    assert first is not None
    assert first.idle_j == pytest.approx(400.0)  # nothing ran at all: that is what idle is
    assert first.unattributed_j == pytest.approx(100.0)  # the first second: who knows what ran before
    assert ledger.idle_w == pytest.approx(100.0)
    for i in range(51, 102):
        ledger.read(i * PERIOD_S, 500.0 + 60.0 * (i - 50), 600.0)
    ledger.add(quantum(5.1, 9.0))
    second = closed(ledger).window
    assert second is not None
    assert second.idle_j + second.unattributed_j == pytest.approx(second.counter_j - second.active_j)
    assert second.unattributed_j > 400.0


def test_a_burst_shorter_than_a_cell_has_what_the_cell_drew_above_idle_power() -> None:
    ledger = constant(GpuLedger(), 100.0, 5.0)
    closed(ledger)
    for i, counter_j, watts in ((51, 520.0, 300.0), (52, 540.0, 100.0), (101, 1030.0, 100.0)):  # power lags
        ledger.read(i * PERIOD_S, counter_j, watts)
    ledger.add(quantum(5.09, 5.115))
    second = closed(ledger)
    assert second.window is not None
    assert second.joules[share()] == pytest.approx(40.0 - 100.0 * 0.175)
    assert second.window.idle_j == pytest.approx(100.0 * (0.175 + 4.9))
    assert second.window.unattributed_j == pytest.approx(0.0, abs=1e-9)


def test_a_window_is_not_shorter_than_asked_and_waits_for_what_is_not_known_yet() -> None:
    ledger = constant(GpuLedger(5.0), 300.0, 8.0)
    assert ledger.settle(4.9) == []
    (settled,) = ledger.settle(7.0)
    assert settled.window is not None
    assert settled.window.end_s - settled.window.start_s >= 5.0 - 1e-9


def test_a_counter_that_goes_backwards_makes_its_window_unknown_not_zero() -> None:
    ledger = GpuLedger()
    for i in range(20):
        ledger.read(i * PERIOD_S, 1e6 + 30.0 * i if i < 10 else 30.0 * i, 300.0)
    ledger.add(quantum(0.2, 0.5))
    (settled,) = ledger.settle(math.inf)
    assert settled.window is None
    assert "backwards" in settled.reason
    assert share() in settled.joules
    assert not ledger.windows


def test_what_is_pending_is_estimated_beyond_the_last_reading_too() -> None:
    ledger = constant(GpuLedger(), 500.0, 5.0, scale=1.2)
    ledger.settle(math.inf)
    ledger.read(5.1, 1.2 * 500 * 5.1, 500.0)
    ledger.add(quantum(5.0, 5.3))
    assert ledger.pending_j("a") == {share(): pytest.approx(0.3 * 600)}
    assert ledger.pending_j("b") == {}
    ledger.add(quantum(5.3, 5.5, "b", model_j=90.0))
    assert ledger.pending_j("b") == {share("b"): pytest.approx(90.0)}


def test_the_profile_is_compared_with_what_was_metered() -> None:
    ledger = constant(GpuLedger(), 500.0, 5.0)
    ledger.add(Quantum(1.0, 3.0, share(), 1.0, model_j=900.0))
    window = closed(ledger).window
    assert window is not None
    assert window.model_j == pytest.approx(900.0)
    assert window.active_j == pytest.approx(1000.0)


def test_work_that_comes_after_its_time_was_settled_is_said_to() -> None:
    ledger = constant(GpuLedger(), 500.0, 5.0)
    ledger.settle(2.0)
    assert "settled" in ledger.add(quantum(1.0, 3.0))
    assert not ledger.add(quantum(2.0, 3.0))


def test_of_work_long_after_the_last_reading_nothing_is_known_and_in_the_end_nothing_kept() -> None:
    ledger = constant(GpuLedger(), 500.0, 5.0)
    assert not ledger.add(quantum(6.0, 9.9))
    for start_s in range(10, 2000):
        assert "no reading" in ledger.add(quantum(float(start_s), start_s + 1.0))
    assert len(ledger._quanta) < 700
    ledger.read(5000.0, 600.0 * 5000, 500.0)
    ledger.settle(math.inf)
    assert not ledger._quanta and len(ledger.windows) == 2


def test_a_counter_that_is_not_told_for_long_leaves_joules_unknown_until_it_is_again() -> None:
    ledger, settled = GpuLedger(), list[Settled]()
    for i in range(2000):
        ledger.read(i * PERIOD_S, 50.0 * i if i < 20 or i > 1500 else None, 500.0)
        if i % 10 == 9:
            assert not ledger.add(quantum(i * PERIOD_S - 0.8, i * PERIOD_S, f"r{i}"))
        settled += ledger.settle(i * PERIOD_S - 1.0)
        assert len(ledger._raw) < 100
    unknown = {share.request_id for some in settled if some.window is None for share in some.joules}
    assert all("not been told" in some.reason for some in settled if some.window is None)
    assert unknown == {f"r{i}" for i in range(9, 1501, 10)}
    assert len(ledger.windows) == 9 and all(window.scale == pytest.approx(1) for window in ledger.windows)


def test_a_counter_that_stands_still_beside_power_says_nothing() -> None:
    ledger = constant(GpuLedger(), 500.0, 5.0, scale=0.0)
    ledger.add(quantum(1.0, 2.0))
    settled = closed(ledger)
    assert settled.window is None and "stood still" in settled.reason
    assert closed(constant(GpuLedger(), 0.0, 5.0)).window is not None and constant(GpuLedger(), 0.0, 5.0).drift is None
