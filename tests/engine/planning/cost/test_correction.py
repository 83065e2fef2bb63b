import math

import pytest

from tests.engine.planning.simulation import flux_profile
from tetrion.engine.planning.cost.correction import CostModel, CostModels


def test_observations_move_only_their_own_cost() -> None:
    model = CostModel(flux_profile())
    for _ in range(60):
        model.observe_step("1024x1024", 2, 0.1057 * 1.3)
        model.observe_aux("256x256", "encode", 0.050)
        model.observe_aux("512x512", "decode", 0.0175)
    assert model.profile.step_s("1024x1024", 2) == pytest.approx(0.1057 * 1.3, rel=0.01)
    assert model.profile.cost("256x256").aux_s["encode"] == pytest.approx(0.050, rel=0.01)
    assert model.profile.cost("512x512").aux_s["decode"] == pytest.approx(0.0175, rel=0.01)
    base = flux_profile()
    assert model.profile.step_s("1024x1024", 1) == pytest.approx(base.step_s("1024x1024", 1))
    assert model.profile.step_s("2048x2048", 2) == pytest.approx(base.step_s("2048x2048", 2))


def test_a_table_wrong_by_a_large_factor_is_corrected() -> None:
    model = CostModel(flux_profile())
    for _ in range(60):
        model.observe_step("256x256", 1, 30 * 0.0302)
    assert model.profile.step_s("256x256", 1) == pytest.approx(30 * 0.0302, rel=0.02)


def test_one_outlier_moves_a_settled_cost_by_at_most_a_fifth() -> None:
    model = CostModel(flux_profile())
    for _ in range(30):
        model.observe_step("1024x1024", 1, 0.1647)
    model.observe_step("1024x1024", 1, 1000.0)
    assert 0.1647 < model.profile.step_s("1024x1024", 1) <= 0.1647 * 1.2001


@pytest.mark.parametrize("step_s", [0.0, -1.0, math.nan, math.inf])
def test_impossible_times_are_ignored(step_s: float) -> None:
    model = CostModel(flux_profile())
    model.observe_step("1024x1024", 1, step_s)
    assert model.profile == flux_profile()


def test_an_observed_size_becomes_a_class_and_a_lacking_degree_does_not() -> None:
    model = CostModel(flux_profile())
    for _ in range(40):
        model.observe_step("640x480", 2, 0.1)
        model.observe_step("640x480", 5, 0.1)
    assert model.profile.step_s("640x480", 2) == pytest.approx(0.1, rel=0.02)
    assert model.profile.degrees("640x480") == (1, 2, 3, 4, 6, 8)
    assert "640x480" in model.profile.classes


def test_profiles_handed_out_do_not_change() -> None:
    model = CostModel(flux_profile())
    first = model.profile
    model.observe_step("1024x1024", 1, 0.3)
    second = model.profile
    assert first == flux_profile()
    assert second != first
    assert model.profile is second


def test_smoothing_has_bounds() -> None:
    with pytest.raises(ValueError, match="smoothing: must be above 0 and at most 1, got 0"):
        CostModel(flux_profile(), smoothing=0)


def test_what_wavers_by_less_than_the_tolerance_makes_no_new_profile() -> None:
    model = CostModel(flux_profile())
    first, step_s = model.profile, 0.1647
    for number in range(200):
        model.observe_step("1024x1024", 1, step_s * (1.015 if number % 2 else 0.985))
    assert model.profile is first
    for _ in range(40):
        model.observe_step("1024x1024", 1, step_s * 1.03)
    assert model.profile is not first
    assert model.profile.step_s("1024x1024", 1) == pytest.approx(step_s * 1.03, rel=0.02)


def test_a_first_step_in_two_branches_leaves_other_sizes_as_they_were_estimated() -> None:
    model, before = CostModel(flux_profile()), flux_profile()
    for _ in range(30):
        model.observe_step("1024x1024*2", 2, 0.200)
    assert model.profile.step_s("1024x1024*2", 2) == pytest.approx(0.200, rel=0.02)
    assert model.profile.step_s("512x512*2", 2) == pytest.approx(before.step_s("512x512*2", 2))
    assert model.profile.step_s("1024x1024", 2) == before.step_s("1024x1024", 2)


def test_each_model_is_corrected_by_itself_and_the_tables_are_one_value_meanwhile() -> None:
    models = CostModels({"a": flux_profile(), "b": flux_profile()})
    tables = models.tables
    assert models.tables is tables
    for _ in range(10):
        models["b"].observe_step("1024x1024", 1, 0.3)
    assert models.tables is not tables and models.tables.profiles["a"] is tables.profiles["a"]
    assert models.tables.cost("b", "1024x1024").step_s(1) > 0.25 > models.tables.cost("a", "1024x1024").step_s(1)
