"""How well the joules of windows are known together."""

import msgspec
import pytest

from tetrion.engine.energy.figures import MeterErrors, Totals, errors_of
from tetrion.engine.energy.gpu_ledger import Settled, Window

SATURATED = Window(
    start_s=0.0,
    end_s=5.0,
    counter_j=3300.0,
    active_j=3190.0,
    idle_j=44.0,
    unattributed_j=66.0,
    raw_active_j=2900.0,
    raw_idle_j=40.0,
    raw_unattributed_j=60.0,
    scale=1.1,
    model_j=3000.0,
)
QUIET = msgspec.structs.replace(
    SATURATED,
    counter_j=500.0,
    active_j=100.0,
    idle_j=380.0,
    unattributed_j=20.0,
    raw_active_j=100.0,
    raw_idle_j=380.0,
    raw_unattributed_j=20.0,
    scale=1.0,
    model_j=200.0,
)


def test_windows_count_by_their_joules() -> None:
    errors = errors_of([SATURATED, QUIET])
    assert errors.unattributed_share == pytest.approx(80 / 3000)
    assert errors.raw_error == pytest.approx(3300 * (1 - 1 / 1.1) / 3800)
    assert errors.model_error == pytest.approx(3200 / 3290 - 1)


def test_totals_have_those_of_all_windows_and_an_abandoned_one_is_none() -> None:
    totals = Totals()
    for window in (SATURATED, None, QUIET):
        totals.add(Settled(window=window, joules={}))
    assert totals.errors == errors_of([SATURATED, QUIET]) and totals.num_windows == 2


def test_what_the_profile_does_not_know_is_left_out_of_its_error() -> None:
    unknown = msgspec.structs.replace(SATURATED, model_j=None)
    assert errors_of([unknown, QUIET]).model_error == pytest.approx(1.0)
    assert errors_of([unknown]).model_error is None
    assert errors_of([]) == MeterErrors()
