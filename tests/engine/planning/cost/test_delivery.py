import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetrion.engine.planning.cost.delivery import DeliveryModel

MEGAPIXEL = 1024 * 1024


def test_what_is_handed_over_as_it_is_takes_no_time() -> None:
    assert DeliveryModel().predict_s(None, MEGAPIXEL) == 0.0


def test_larger_pictures_take_longer_and_jpeg_less_than_png() -> None:
    model = DeliveryModel()
    assert 0 < model.predict_s("png", 256 * 256) < model.predict_s("png", MEGAPIXEL)
    assert model.predict_s("jpeg", MEGAPIXEL) < model.predict_s("png", MEGAPIXEL) < model.predict_s("webp", MEGAPIXEL)


def test_it_learns_by_format_and_others_of_the_format_learn_from_the_nearest_size() -> None:
    model, fresh = DeliveryModel(), DeliveryModel()
    for _ in range(60):
        model.observe("png", MEGAPIXEL, 5 * fresh.predict_s("png", MEGAPIXEL))
        model.observe("png", 256 * 256, 2 * fresh.predict_s("png", 256 * 256))
    for pixels, times in ((MEGAPIXEL, 5), (256 * 256, 2), (4 * MEGAPIXEL, 5), (128 * 128, 2)):
        assert model.predict_s("png", pixels) == pytest.approx(times * fresh.predict_s("png", pixels), rel=0.02)
    assert model.predict_s("jpeg", MEGAPIXEL) == fresh.predict_s("jpeg", MEGAPIXEL)


def test_one_stalled_delivery_moves_a_settled_prediction_by_at_most_a_tenth() -> None:
    model = DeliveryModel()
    for _ in range(30):
        model.observe("png", MEGAPIXEL, 0.05)
    model.observe("png", MEGAPIXEL, 1000.0)
    assert 0.05 < model.predict_s("png", MEGAPIXEL) <= 0.05 * 1.101


@settings(deadline=None)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=50))
def test_any_times_leave_a_prediction_that_can_be_planned_with(times_s: list[float]) -> None:
    model, fresh = DeliveryModel(), DeliveryModel()
    for time_s in times_s:
        model.observe("webp", MEGAPIXEL, time_s)
    predicted_s = model.predict_s("webp", MEGAPIXEL)
    assert 0 < predicted_s < math.inf
    if not any(0 < time_s < math.inf for time_s in times_s):
        assert predicted_s == fresh.predict_s("webp", MEGAPIXEL)
