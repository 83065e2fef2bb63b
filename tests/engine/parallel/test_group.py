"""Groups as values: every row, head and branch is somebody's, and nobody's twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrion.engine.parallel.group import BranchLayout, GroupShape, first_rows, plan_group, split

members_lists = st.lists(st.integers(0, 63), min_size=1, max_size=8, unique=True).map(tuple)


@given(count=st.integers(0, 10_000), parts=st.integers(1, 64))
def test_a_split_is_even_and_complete(count: int, parts: int) -> None:
    ranges = split(count, parts)
    assert [i for r in ranges for i in r] == list(range(count))
    sizes = [len(r) for r in ranges]
    assert len(sizes) == parts and max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@given(
    members=members_lists,
    counts=st.lists(st.integers(0, 1000), min_size=0, max_size=2),
    stepped=st.integers(8, 4096),
    num_heads=st.integers(8, 40),
    place=st.integers(0, 2),
)
def test_shards_cover_every_row_and_head_once(
    members: tuple[int, ...], counts: list[int], stepped: int, num_heads: int, place: int
) -> None:
    counts.insert(place, stepped)
    plan = plan_group(members, counts, num_heads)
    assert plan.members == members and plan.degree == len(members) and plan.counts == tuple(counts)
    assert [s.rank for s in plan.shards] == list(range(len(members)))
    rows = [row for s in plan.shards for part in plan.canonical_rows(s) for row in part]
    assert sorted(rows) == list(range(sum(counts)))
    assert [h for s in plan.shards for h in s.heads] == list(range(num_heads))
    assert all(s.heads for s in plan.shards) and sum(s.num_rows for s in plan.shards) == sum(counts)
    for segment, (start, count) in enumerate(zip(first_rows(counts), counts, strict=True)):
        own = [row for s in plan.shards for row in plan.canonical_rows(s)[segment]]
        assert own == list(range(start, start + count)), "members hold a segment's rows in the order of their ranks"


@given(
    members=members_lists,
    counts=st.lists(st.integers(8, 1000), min_size=1, max_size=3),
    num_heads=st.integers(8, 40),
)
def test_all_members_pad_alike_and_nobody_by_more_than_a_row(
    members: tuple[int, ...], counts: list[int], num_heads: int
) -> None:
    plan = plan_group(members, counts, num_heads)
    shapes = [plan.shape_of(member) for member in members]
    assert len({shape.padded for shape in shapes}) == 1
    for shard, shape in zip(plan.shards, shapes, strict=True):
        assert shape.own_heads == len(shard.heads) and shape.num_tokens == sum(counts)
        assert all(0 <= pad - len(rows) <= 1 for pad, rows in zip(shape.padded, shard.rows, strict=True))
        assert shape.num_local == sum(shape.padded) >= shard.num_rows
    if num_heads % len(members) == 0:
        assert len(set(shapes)) == 1


def test_an_uneven_split_by_hand() -> None:
    plan = plan_group((7, 2, 5), counts=(4, 8, 2), num_heads=38)
    middle = plan.shard_of(2)
    assert (middle.rank, middle.rows, middle.heads) == (1, (range(2, 3), range(3, 6), range(1, 2)), range(13, 26))
    assert plan.canonical_rows(middle) == (range(2, 3), range(7, 10), range(13, 14)) and middle.num_rows == 5
    assert plan.shape_of(2) == GroupShape((4, 8, 2), 3, 13) and plan.shape_of(2).padded == (2, 3, 1)


@given(members=members_lists, num_keys=st.integers(8, 16), heads_per_key=st.integers(1, 5))
def test_queries_are_with_the_keys_that_they_share(members: tuple[int, ...], num_keys: int, heads_per_key: int) -> None:
    plan = plan_group(members, (20, 30), num_keys * heads_per_key, heads_per_key)
    assert [h for shard in plan.shards for h in shard.key_heads] == list(range(num_keys))
    for shard in plan.shards:
        assert [h // heads_per_key for h in shard.heads] == [k for k in shard.key_heads for _ in range(heads_per_key)]
        assert plan.shape_of(shard.device_id).own_heads == len(shard.heads) > 0


def test_groups_that_are_too_large_are_errors_with_numbers() -> None:
    with pytest.raises(ValueError, match="degree 4 is more than the model's 3 heads"):
        plan_group((0, 1, 2, 3), (10, 100), 3)
    with pytest.raises(ValueError, match="degree 4 is more than the model's 3 heads"):
        plan_group((0, 1, 2, 3), (10, 100), 12, 4)
    with pytest.raises(ValueError, match="degree 4 is more than the longest segment's 3 rows"):
        plan_group((0, 1, 2, 3), (2, 3), 8)


def test_impossible_groups_are_our_own_mistakes() -> None:
    with pytest.raises(AssertionError):
        plan_group((0, 1, 0), (10, 100), 8)
    with pytest.raises(AssertionError):
        plan_group((), (10, 100), 8)
    with pytest.raises(AssertionError):
        plan_group((0, 1), (10, 100), 8).shard_of(2)
    with pytest.raises(AssertionError):
        BranchLayout(members=(0, 1), num_branches=2).part_of(2)


@given(members=members_lists, num_branches=st.integers(1, 2))
def test_every_branch_is_evaluated_by_one_part_of_all_ranks(members: tuple[int, ...], num_branches: int) -> None:
    layout = BranchLayout(members=members, num_branches=num_branches)
    assert sum(layout.parts, ()) == members, "parts follow each other in the order of ranks"
    assert len({len(part) for part in layout.parts}) == 1
    evaluated = [b for part in layout.parts for b in layout.branches_of(part[0])]
    assert evaluated == list(range(num_branches))
    for member in members:
        assert member in layout.part_of(member) and member in layout.partners_of(member)
        assert layout.branches_of(member) == layout.branches_of(layout.part_of(member)[0])
        assert len(layout.partners_of(member)) == len(layout.parts)
        for part, partner in zip(layout.parts, layout.partners_of(member), strict=True):
            assert part.index(partner) == layout.part_of(member).index(member), "partners are of equal rank"


@pytest.mark.parametrize(
    ("members", "num_branches", "parts"),
    [
        ((4, 2), 1, ((4, 2),)),
        ((4,), 2, ((4,),)),
        ((4, 2), 2, ((4,), (2,))),
        ((4, 2, 0), 2, ((4, 2, 0),)),
        ((4, 2, 0, 1), 2, ((4, 2), (0, 1))),
    ],
)
def test_branches_are_apart_where_the_degree_divides(
    members: tuple[int, ...], num_branches: int, parts: tuple[tuple[int, ...], ...]
) -> None:
    layout = BranchLayout(members=members, num_branches=num_branches)
    assert layout.parts == parts
    branches = [layout.branches_of(member) for member in members]
    assert branches == [
        (i,) if len(parts) > 1 else tuple(range(num_branches)) for i, part in enumerate(parts) for _ in part
    ]


def test_partners_hold_the_same_rows_of_the_image() -> None:
    layout = BranchLayout(members=(5, 1, 3, 0), num_branches=2)
    assert layout.partners_of(1) == layout.partners_of(0) == (1, 0)
    plans = [plan_group(part, (text, 9), 6) for part, text in zip(layout.parts, (7, 4), strict=True)]
    assert plans[0].shard_of(1).rows[1] == plans[1].shard_of(0).rows[1] == range(5, 9)
