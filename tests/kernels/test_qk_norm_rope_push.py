"""Every member pushes; every slab must hold q, k, v of all rows, for its heads, in canonical order of the segments."""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.group_slabs import GroupSlabs
from tests.kernels.tolerance import assert_close, poisoned
from tetrion.engine.parallel.group import GroupPlan, Shard, first_rows, plan_group
from tetrion.kernels import reference
from tetrion.kernels.qk_norm_rope_push import Piece, qk_norm_rope_push

GROUPS = [
    ((0,), (13, 40), 4, 64),
    ((1, 0), (8, 64), 4, 128),
    ((2, 0, 1), (7, 29), 7, 32),
    ((0, 3, 1, 2), (2, 30), 6, 32),  # two members without rows of the first segment
    ((1, 3), (0, 21), 5, 32),
    ((1, 0, 2), (5, 24, 9), 5, 64),
    ((3, 1), (21,), 3, 64),
    ((2, 1, 0, 3), (17, 0, 3), 6, 128),
]


class Weights(NamedTuple):
    """Of one segment."""

    q_norm: Tensor | None
    k_norm: Tensor | None
    has_rope: bool
    epsilon: float


class Projections:
    """A whole sequence's projections, segment by segment, with weights of their own."""

    def __init__(self, plan: GroupPlan, head_dim: int, dtype: torch.dtype, heads_per_key: int = 1) -> None:
        self.plan, self.head_dim, self.dtype, self.heads_per_key = plan, head_dim, dtype, heads_per_key
        num_keys = plan.num_heads // heads_per_key
        self.heads = [plan.num_heads, num_keys, num_keys]
        width = sum(self.heads) * head_dim
        self.qkv = [torch.randn(count, width).to(dtype) for count in plan.counts]
        self.weights = [Weights(self._norm(), self._norm(), True, 1e-6) for _ in plan.counts]
        angles = torch.randn(sum(plan.counts), head_dim // 2) * 3
        self.rope = angles.cos(), angles.sin()

    def _norm(self) -> Tensor:
        return (torch.rand(self.head_dim) + 0.5).to(self.dtype)

    def pieces(self, shard: Shard, over: Sequence[int], padding: int) -> list[Piece]:
        """The member's rows as slices of wider rows, followed by rows of NaN."""
        pieces = []
        for segment in over:
            rows, whole = shard.rows[segment], self.qkv[segment]
            wide = poisoned(len(rows) + padding, whole.shape[1] + 64, dtype=whole.dtype)
            wide[: len(rows), : whole.shape[1]] = whole[rows.start : rows.stop]
            pieces.append(Piece(wide[:, : whole.shape[1]], segment, *self.weights[segment]))
        return pieces

    def push(self, slabs: GroupSlabs, over: Sequence[int], padding: int = 0) -> None:
        for shard in self.plan.shards:
            qk_norm_rope_push(
                self.pieces(shard, over, padding),
                self.rope,
                slabs.table,
                slabs.words(shard.rank),
                slabs.status,
                slabs.bases,
                slabs.offsets,
                degree=self.plan.degree,
                num_heads=self.plan.num_heads,
                head_dim=self.head_dim,
                heads_per_key=self.heads_per_key,
            )

    def expected(self, over: Sequence[int]) -> list[Tensor]:
        """q, k, v of all rows and heads, fp32."""
        starts, parts = first_rows(self.plan.counts), []
        for segment in over:
            q_norm, k_norm, has_rope, epsilon = self.weights[segment]
            rows = slice(starts[segment], starts[segment] + self.plan.counts[segment])
            rope = tuple(x[rows].repeat_interleave(2, dim=1) for x in self.rope) if has_rope else None
            norms = (None if norm is None else norm.float() for norm in (q_norm, k_norm))
            qkv = self.qkv[segment].float().unflatten(1, (sum(self.heads), self.head_dim)).split(self.heads, dim=1)
            if len(qkv[0]):
                parts.append(reference.qk_norm_rope(qkv, *norms, rope, epsilon))
        return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def check(sequence: Projections, over: Sequence[int], padding: int = 0) -> None:
    plan = sequence.plan
    slabs = GroupSlabs(plan, sequence.head_dim, sequence.dtype)
    sequence.push(slabs, over, padding)
    q, k, v = sequence.expected(over)
    for shard in plan.shards:
        keys = slice(shard.key_heads.start, shard.key_heads.stop)
        pushed_q, pushed_k, pushed_v = slabs.take_qkv(shard.rank, over)
        assert_close(pushed_q, q[:, shard.heads.start : shard.heads.stop])
        assert_close(pushed_k, k[:, keys])
        assert torch.equal(pushed_v.float(), v[:, keys])
    slabs.assert_untouched()


@pytest.mark.parametrize(("members", "counts", "num_heads", "head_dim"), GROUPS)
def test_slabs_hold_what_the_reference_computes(device, dtype, members, counts, num_heads, head_dim) -> None:
    plan = plan_group(members, counts, num_heads)
    check(Projections(plan, head_dim, dtype), range(len(counts)), padding=3)


@pytest.mark.parametrize(("members", "num_heads", "heads_per_key"), [((0,), 6, 3), ((2, 0), 12, 4), ((1, 0, 2), 8, 2)])
def test_queries_go_with_the_keys_that_they_share(device, dtype, members, num_heads, heads_per_key) -> None:
    """The last group's four heads of keys are two, one and one."""
    plan = plan_group(members, (7, 29), num_heads, heads_per_key)
    check(Projections(plan, 32, dtype, heads_per_key), (0, 1), padding=2)


def test_bits_of_grouped_heads_do_not_depend_on_the_group(device, dtype) -> None:
    alone = plan_group((0,), (9, 50), 6, 2)
    sequence, slabs = Projections(alone, 64, dtype, 2), GroupSlabs(alone, 64, dtype)
    sequence.push(slabs, (0, 1))
    whole_q, *whole_kv = slabs.take_qkv(0, (0, 1))
    for members in ((0, 1), (2, 1, 0)):
        sequence.plan = plan = plan_group(members, (9, 50), 6, 2)
        slabs = GroupSlabs(plan, 64, dtype)
        sequence.push(slabs, (0, 1))
        for shard in plan.shards:
            q, *kv = slabs.take_qkv(shard.rank, (0, 1))
            assert torch.equal(q, whole_q[:, shard.heads.start : shard.heads.stop])
            for part, whole in zip(kv, whole_kv, strict=True):
                assert torch.equal(part, whole[:, shard.key_heads.start : shard.key_heads.stop])


@pytest.mark.parametrize("over", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_attention_over_some_segments_turns_rows_by_their_place_in_the_whole(device, over) -> None:
    check(Projections(plan_group((1, 2, 0), (5, 22, 8), 5), 64, torch.float32), over, 2)


def test_norms_rope_and_epsilon_are_each_segments_own(device, dtype) -> None:
    sequence = Projections(plan_group((1, 0), (5, 22, 8), 5), 64, dtype)
    q_norm, k_norm = torch.rand(2, 64).to(dtype)
    kinds = [Weights(None, None, False, 1e-6), Weights(q_norm, None, True, 0.5), Weights(None, k_norm, False, 1e-5)]
    for turn in (0, 2):
        sequence.weights = kinds[turn:] + kinds[:turn]
        check(sequence, (0, 1, 2))


def test_without_norm_and_rope_bits_are_copied(device, dtype) -> None:
    plan = plan_group((0,), (5, 22), 3)
    sequence, slabs = Projections(plan, 32, dtype), GroupSlabs(plan, 32, dtype)
    sequence.weights = [Weights(None, None, False, 1e-6)] * 2
    sequence.push(slabs, (0, 1))
    whole = torch.cat(sequence.qkv).unflatten(1, (3, 3, 32))
    for pushed, part in zip(slabs.take_qkv(0, (0, 1)), whole.unbind(1), strict=True):
        assert torch.equal(pushed, part)


def test_bits_do_not_depend_on_the_group(device, dtype) -> None:
    alone = plan_group((0,), (9, 50), 6)
    sequence, slabs = Projections(alone, 64, dtype), GroupSlabs(alone, 64, dtype)
    sequence.push(slabs, (0, 1))
    whole = slabs.take_qkv(0, (0, 1))
    for members in ((0, 1), (2, 1, 0), (3, 0, 1, 2)):
        sequence.plan = plan = plan_group(members, (9, 50), 6)
        slabs = GroupSlabs(plan, 64, dtype)
        sequence.push(slabs, (0, 1))
        for shard in plan.shards:
            for part, all_heads in zip(slabs.take_qkv(shard.rank, (0, 1)), whole, strict=True):
                assert torch.equal(part, all_heads[:, shard.heads.start : shard.heads.stop])


def test_strided_rope_and_all_segments_in_one_tensor(device, dtype) -> None:
    """Single blocks: one projection, text rows first; diffusers' tables hold each angle twice."""
    plan = plan_group((1,), (6, 20), 4)
    sequence, slabs = Projections(plan, 32, dtype), GroupSlabs(plan, 32, dtype)
    sequence.weights = [sequence.weights[0]] * 2
    rope = tuple(x.repeat_interleave(2, dim=1)[:, ::2] for x in sequence.rope)
    parts = torch.cat(sequence.qkv).split([6, 20])
    pieces = [Piece(part, segment, *sequence.weights[0]) for segment, part in enumerate(parts)]
    words = (slabs.table, slabs.words(0), slabs.status, slabs.bases, slabs.offsets)
    qk_norm_rope_push(pieces, rope, *words, degree=1, num_heads=4, head_dim=32)
    for pushed, expected in zip(slabs.take_qkv(0, (0, 1)), sequence.expected((0, 1)), strict=True):
        assert_close(pushed, expected)
    slabs.assert_untouched()


@pytest.mark.parametrize("word", [0, 1])
def test_nothing_is_stored_once_something_went_wrong(device, word) -> None:
    plan = plan_group((1, 0), (6, 20), 4)
    slabs = GroupSlabs(plan, 32, torch.float32)
    slabs.status[word] = 1
    Projections(plan, 32, torch.float32).push(slabs, (0, 1))
    slabs.assert_untouched()


def test_segments_out_of_order_are_refused(device) -> None:
    plan = plan_group((0,), (6, 20), 4)
    with pytest.raises(AssertionError, match="segments"):
        Projections(plan, 32, torch.float32).push(GroupSlabs(plan, 32, torch.float32), (1, 0))
