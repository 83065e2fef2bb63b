"""Groups as values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrion.engine.parallel.group import plan_group, shard, split


@given(count=st.integers(0, 10_000), parts=st.integers(1, 64))
def test_split_is_even_and_complete(count: int, parts: int) -> None:
    ranges = split(count, parts)
    assert [i for r in ranges for i in r] == list(range(count))
    sizes = [len(r) for r in ranges]
    assert len(sizes) == parts and max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@given(
    members=st.lists(st.integers(0, 63), min_size=1, max_size=8, unique=True).map(tuple),
    num_text=st.integers(0, 512),
    num_image=st.integers(8, 4096),
    num_heads=st.integers(8, 38),
)
def test_shards_cover_everything_once(members: tuple[int, ...], num_text: int, num_image: int, num_heads: int) -> None:
    plan = plan_group(members, num_text, num_image, num_heads)
    assert plan.members == members and plan.degree == len(members)
    assert [s.rank for s in plan.shards] == list(range(len(members)))
    rows = [row for s in plan.shards for part in plan.canonical_rows(s) for row in part]
    assert sorted(rows) == list(range(num_text + num_image)) and len(rows) == plan.num_tokens
    assert [h for s in plan.shards for h in s.heads] == list(range(num_heads))
    assert all(s.heads and s.image for s in plan.shards)
    assert all(shard(members, s.device_id, num_text, num_image, num_heads) == s for s in plan.shards)


def test_uneven_split_by_hand() -> None:
    plan = plan_group((7, 2, 5), num_text=4, num_image=8, num_heads=38)
    middle = plan.shard_of(2)
    assert (middle.rank, middle.text, middle.image, middle.heads) == (1, range(2, 3), range(3, 6), range(13, 26))
    assert plan.canonical_rows(middle) == (range(2, 3), range(7, 10)) and middle.num_tokens == 4


def test_too_large_groups_are_errors_with_numbers() -> None:
    with pytest.raises(ValueError, match="degree 4 is more than the model's 3 heads"):
        plan_group((0, 1, 2, 3), 10, 100, 3)
    with pytest.raises(ValueError, match="degree 4 is more than the picture's 2 image tokens"):
        plan_group((0, 1, 2, 3), 10, 2, 8)


def test_impossible_groups_are_our_own_mistakes() -> None:
    with pytest.raises(AssertionError):
        plan_group((0, 1, 0), 10, 100, 8)
    with pytest.raises(AssertionError):
        plan_group((), 10, 100, 8)
    with pytest.raises(AssertionError):
        shard((0, 1), 2, 10, 100, 8)
