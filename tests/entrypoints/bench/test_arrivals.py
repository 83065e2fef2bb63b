"""Arrival processes: what production arrivals are made of, and how bursty they are."""

import msgspec
import numpy as np
import pytest

from tetrion.entrypoints.bench.arrivals import (
    SESSIONS,
    Sessions,
    dispersion,
    gamma,
    gap_variation,
    poisson,
    production,
    session_sizes,
)

SOURCE = {0.1: 5.1, 1: 6.5, 3: 9.2, 10: 22, 30: 57, 100: 160, 300: 420}
"""Windows in mean gaps -> index of dispersion of pictures on the median day of GenTD26 (see `Sessions`)."""
SOURCE_TAIL = {2: 0.681, 5: 0.261, 10: 0.099, 20: 0.0315, 50: 0.0049, 100: 0.0012}
"""Share of its sessions with at least so many requests."""


def draw(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_poisson_arrivals_disperse_alike_at_every_window_and_gamma_ones_by_their_burstiness() -> None:
    times_s = poisson(draw(), 100_000, 1.0)
    assert [dispersion(times_s, window_s) for window_s in (0.1, 1.0, 10.0, 100.0)] == pytest.approx([1] * 4, abs=0.12)
    assert gap_variation(times_s) == pytest.approx(1, abs=0.02)
    bursts_s = gamma(draw(), 100_000, 1.0, 4.0)
    assert gap_variation(bursts_s) == pytest.approx(4, rel=0.05)
    assert dispersion(bursts_s, 300.0) == pytest.approx(16, rel=0.25)


def test_dispersion_needs_two_windows() -> None:
    assert np.isnan(dispersion(np.array([0.0, 1.0, 2.0]), 1.5))


def test_production_arrivals_disperse_as_those_of_the_source_at_every_window() -> None:
    """On days as busy as its own; ratios are of medians over 14 days, as the source's figures are."""
    days = [production(draw(seed), 4_600, 1.0) for seed in range(14)]
    for window, expected in SOURCE.items():
        found = np.median([dispersion(times_s, window) for times_s in days])
        assert found == pytest.approx(expected, rel=0.35), window
    assert np.median([gap_variation(times_s) for times_s in days]) > 6


def test_sessions_are_as_long_as_those_of_the_source() -> None:
    sizes = session_sizes(draw(), 200_000, SESSIONS)
    assert sizes.mean() == pytest.approx(SESSIONS.requests_per_session, rel=0.03)
    for least, share in SOURCE_TAIL.items():
        assert (sizes >= least).mean() == pytest.approx(share, rel=0.12), least


@pytest.mark.parametrize("num", [1, 7, 700, 40_000])
def test_production_arrivals_are_so_many_at_the_rate_asked_for_and_repeat(num: int) -> None:
    times_s = production(draw(3), num, 0.5)
    assert times_s.size == num and (np.diff(times_s) >= 0).all() and times_s[0] >= 0
    assert times_s[-1] == pytest.approx(num * 0.5)
    assert (times_s == production(draw(3), num, 0.5)).all()
    assert num == 1 or (times_s != production(draw(4), num, 0.5)).any()


def test_sessions_without_ramp_of_single_requests_are_poisson() -> None:
    lone = Sessions(tail=50.0, size=0.01, pictures=((1, 1.0),), ramp=0.0)
    times_s = production(draw(), 20_000, 1.0, lone)
    assert [dispersion(times_s, window_s) for window_s in (1.0, 10.0, 100.0)] == pytest.approx([1] * 3, abs=0.2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tail", 1.0),
        ("size", 0.0),
        ("gap_median_s", 2000.0),
        ("gap_sigma", -1.0),
        ("longest_gap_s", 1e6),
        ("pictures", ()),
        ("pictures", ((0, 1.0),)),
        ("ramp", -1.0),
        ("requests_per_min", 0.0),
    ],
)
def test_bad_sessions_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^sessions\.{field}: must be"):
        msgspec.structs.replace(SESSIONS, **{field: value})  # type: ignore[arg-type]
