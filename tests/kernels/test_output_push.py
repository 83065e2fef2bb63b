"""Every member pushes its heads; every row's owner must hold all heads of its rows, segment by segment, padded."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.group_slabs import GroupSlabs, rows_in
from tests.kernels.tolerance import poisoned
from tetrion.engine.parallel.group import plan_group
from tetrion.kernels.output_push import output_push

GROUPS = [
    ((0,), (13, 40), 4, 64),
    ((1, 0), (8, 64), 4, 128),
    ((2, 0, 1), (7, 29), 7, 32),
    ((0, 3, 1, 2), (2, 30), 6, 32),
    ((1, 3), (0, 21), 5, 32),
    ((1, 0, 2), (5, 24, 9), 5, 64),
    ((3, 1), (21,), 3, 64),
    ((2, 1, 0, 3), (17, 0, 3), 6, 128),
]


def push(slabs: GroupSlabs, output: Tensor, over: Sequence[int]) -> None:
    """`output`: of all heads. Every member gives its heads as a slice of more."""
    plan = slabs.plan
    for shard in plan.shards:
        wide = poisoned(len(output), len(shard.heads) + 1, slabs.head_dim, dtype=slabs.dtype)
        wide[:, :-1] = output[:, shard.heads.start : shard.heads.stop]
        output_push(
            wide[:, :-1],
            over,
            [padded(plan.counts[segment], plan.degree) for segment in over],
            slabs.table,
            slabs.words(shard.rank),
            slabs.status,
            slabs.bases,
            slabs.output_offset,
            degree=plan.degree,
            num_heads=plan.num_heads,
        )


def padded(count: int, degree: int) -> int:
    return -(-count // degree)


def check(slabs: GroupSlabs, over: Sequence[int]) -> None:
    plan = slabs.plan
    sizes = [padded(plan.counts[segment], plan.degree) for segment in over]
    num_rows = sum(plan.counts[segment] for segment in over)
    output = torch.randn(num_rows, plan.num_heads, slabs.head_dim).to(slabs.dtype)
    push(slabs, output, over)
    for shard in plan.shards:
        parts = slabs.take_output(shard.rank, sum(sizes)).split(sizes)
        for part, rows in zip(parts, rows_in(plan, shard, over), strict=True):
            count = rows.stop - rows.start
            assert torch.equal(part[:count], output[rows]) and part[count:].isnan().all()
    slabs.assert_untouched()


@pytest.mark.parametrize(("members", "counts", "num_heads", "head_dim"), GROUPS)
def test_owners_hold_all_heads(device, dtype, members, counts, num_heads, head_dim) -> None:
    check(GroupSlabs(plan_group(members, counts, num_heads), head_dim, dtype), range(len(counts)))


@pytest.mark.parametrize("over", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_attention_over_some_segments(device, over) -> None:
    check(GroupSlabs(plan_group((1, 2, 0), (5, 22, 8), 5), 64, torch.float32), over)


@pytest.mark.parametrize("word", [0, 1])
def test_nothing_is_stored_once_something_went_wrong(device, word) -> None:
    slabs = GroupSlabs(plan_group((1, 0), (6, 20), 4), 32, torch.float32)
    slabs.status[word] = 1
    push(slabs, torch.randn(26, 4, 32), (0, 1))
    slabs.assert_untouched()
