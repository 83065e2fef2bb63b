"""Which tables of degrees are kept when costs are corrected."""

import pytest

from tests.engine.planning.simulation import costs_of, flux_profile
from tetrion.engine.planning.cost.correction import CostModels
from tetrion.engine.planning.degrees import DegreeTables

CORRECTED, OTHER = ("", "1024x1024"), ("", "512x512")


def test_tables_of_classes_that_a_correction_does_not_concern_are_kept() -> None:
    models = CostModels({"": flux_profile()})
    before = DegreeTables(models.tables, 4)
    kept, corrected = before[OTHER], before[CORRECTED]
    for _ in range(20):
        models[""].observe_step(CORRECTED[1], 1, 2 * corrected.step_s[1])
    after = DegreeTables(models.tables, 4, before)
    assert after[OTHER] is kept
    assert after[CORRECTED].step_s[1] == pytest.approx(2 * corrected.step_s[1], rel=0.2)
    assert DegreeTables(models.tables, 4, after)[OTHER] is kept
    assert DegreeTables(models.tables, 3, before)[OTHER] is not kept


def test_tables_are_kept_though_nobody_asked_for_them_between_two_corrections() -> None:
    costs = costs_of(flux_profile())
    before = DegreeTables(costs, 4)
    kept = before[OTHER]
    between = DegreeTables(costs, 4, before)
    assert DegreeTables(costs, 4, between)[OTHER] is kept


def test_tables_of_the_same_costs_are_equal_whatever_was_asked_for() -> None:
    costs = costs_of(flux_profile())
    asked = DegreeTables(costs, 4)
    assert asked[OTHER].widest == 4 and asked == DegreeTables(costs, 4)
    assert asked != DegreeTables(costs, 3)
