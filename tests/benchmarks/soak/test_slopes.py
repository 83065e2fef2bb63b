import numpy as np
import pytest

from benchmarks.soak.slopes import slope_of

TIMES_S = [float(second) for second in range(0, 3600, 5)]


@pytest.mark.parametrize(("per_hour", "verdict"), [(0.0, "flat"), (-20.0, "flat"), (4.0, "flat"), (12.0, "grows")])
def test_a_line_is_judged_by_its_slope(per_hour: float, verdict: str) -> None:
    slope = slope_of(TIMES_S, [100 + per_hour * time_s / 3600 for time_s in TIMES_S], tolerance=5.0)
    assert slope is not None and slope.verdict == verdict
    assert slope.per_hour == pytest.approx(per_hour, abs=1e-6)
    assert slope.low - 1e-6 <= per_hour <= slope.high + 1e-6


@pytest.mark.parametrize(("growth", "verdict"), [(1.0, "flat"), (20.0, "grows")])
def test_a_short_run_is_judged_by_what_grew_in_it(growth: float, verdict: str) -> None:
    times_s = [second / 10 for second in range(600)]
    slope = slope_of(times_s, [100 + growth * time_s / 60 for time_s in times_s], tolerance=5.0)
    assert slope is not None and slope.verdict == verdict


def test_noise_makes_a_verdict_unclear_not_wrong() -> None:
    noise = np.random.default_rng(1).normal(0, 300, len(TIMES_S))
    slope = slope_of(TIMES_S, [100 + value for value in noise.tolist()], tolerance=0.1)
    assert slope is not None and slope.verdict == "unclear"


def test_the_interval_holds_the_true_slope_as_often_as_it_says() -> None:
    rng, held = np.random.default_rng(2), 0
    for _ in range(300):
        noise = rng.normal(0, 10, len(TIMES_S)).tolist()
        slope = slope_of(TIMES_S, [7 * time_s / 3600 + one for time_s, one in zip(TIMES_S, noise, strict=True)], 5.0)
        assert slope is not None
        held += slope.low <= 7 <= slope.high
    assert 270 <= held <= 297


def test_growth_while_it_warms_up_does_not_count() -> None:
    slope = slope_of(TIMES_S, [min(time_s, 800.0) for time_s in TIMES_S], tolerance=5.0)
    assert slope is not None and slope.verdict == "flat" and slope.mean == pytest.approx(800)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_few_samples_have_no_slope(count: int) -> None:
    assert slope_of(TIMES_S[:count], [1.0] * count, tolerance=1.0) is None
