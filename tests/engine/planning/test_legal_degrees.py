"""Which degrees a class of requests may run at."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.planning.policies.test_fixed_and_forced import snapshot
from tetrion.engine.model_spec import MAX_UNEVENNESS, legal_degrees
from tetrion.engine.planning.degrees import DegreeTables
from tetrion.engine.planning.policies.fixed import fixed_planner, static_groups

from .simulation import costs_of, flux_profile, make_profile


@pytest.mark.parametrize(
    ("num_heads", "num_branches", "legal"),
    [
        (24, 1, (1, 2, 3, 4, 5, 6, 7, 8)),
        (24, 2, (1, 2, 3, 4, 5, 6, 7, 8)),
        (38, 1, (1, 2, 3, 4, 5, 6, 7, 8)),
        (4, 1, (1, 2, 4)),
        (4, 2, (1, 2, 4, 8)),
        (6, 1, (1, 2, 3, 6)),
        (6, 2, (1, 2, 3, 4, 6)),
    ],
)
def test_on_eight_devices(num_heads: int, num_branches: int, legal: tuple[int, ...]) -> None:
    assert legal_degrees(num_heads, num_branches, 8) == legal


@given(st.integers(1, 64), st.integers(1, 3), st.integers(1, 128))
def test_even_shares_are_always_legal_and_uneven_ones_within_bounds(
    num_heads: int, num_branches: int, num_devices: int
) -> None:
    legal = legal_degrees(num_heads, num_branches, num_devices)
    assert legal[0] == 1 and legal == tuple(sorted(set(legal))) and legal[-1] <= num_devices
    for degree in range(1, num_devices + 1):
        members = degree // num_branches if degree % num_branches == 0 else degree
        if num_heads % members == 0:
            assert degree in legal
        if degree in legal:
            assert members <= num_heads and -(-num_heads // members) * members <= MAX_UNEVENNESS * num_heads


def test_a_degree_that_the_table_lacks_is_not_used_and_one_that_pays_is() -> None:
    known = flux_profile().classes["1024x1024"].step_ms
    cost = {"step_ms": known | {5: 50.0, 7: 45.0}, "encode_ms": 25, "decode_ms": 120}
    measured = DegreeTables(costs_of(make_profile({"1024x1024": cost})), 8)["", "1024x1024"]
    assert measured.degrees == (1, 2, 3, 4, 5, 6, 8), "7 gains less than 2 % over 6"
    assert DegreeTables(costs_of(flux_profile()), 8)["", "1024x1024"].degrees == (1, 2, 3, 4, 6, 8)
    assert DegreeTables(costs_of(flux_profile()), 8)["", "1024x1024*2"].degrees == (1, 2, 3, 4, 6, 8)


def test_static_groups_have_a_degree_that_is_known_or_even() -> None:
    assert [len(group) for group in static_groups(snapshot(8), 5)] == [4, 4]
    cost = {"step_ms": {1: 9.0, 5: 2.0}, "encode_ms": 1, "decode_ms": 1}
    wide = snapshot(8, make_profile({"512x512": cost}))
    assert [len(group) for group in static_groups(wide, 5)] == [5]
    assert fixed_planner(5)(wide).assignments == ()
