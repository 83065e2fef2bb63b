"""Every member pushes; every slab must hold the whole sequence's q, k, v of its heads in canonical order."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.group_slabs import GroupSlabs, make_plan
from tests.kernels.tolerance import assert_close, poisoned
from tetrion.engine.parallel.group import Shard
from tetrion.kernels import reference
from tetrion.kernels.qk_norm_rope_push import StreamTensors, qk_norm_rope_push

GROUPS = [
    ((0,), 13, 40, 4, 64),
    ((1, 0), 8, 64, 4, 128),
    ((2, 0, 1), 7, 29, 7, 32),
    ((0, 3, 1, 2), 2, 30, 6, 32),  # two members without text
    ((1, 3), 0, 21, 5, 32),
]


class Sequence:
    """A whole sequence's projections, text first, and norm weights of both streams."""

    def __init__(self, num_text: int, num_image: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        num_tokens = num_text + num_image
        self.num_text, self.num_heads, self.head_dim = num_text, num_heads, head_dim
        self.qkv = torch.randn(num_tokens, 3 * num_heads * head_dim).to(dtype)
        self.norms = [(torch.rand(head_dim) + 0.5).to(dtype) for _ in range(4)]
        angles = torch.randn(num_tokens, head_dim // 2) * 3
        self.rope = angles.cos(), angles.sin()

    def streams(self, shard: Shard, padding: int = 0) -> tuple[StreamTensors, StreamTensors]:
        """The member's rows as slices of wider rows, followed by rows of NaN."""
        text, image = self.qkv[: self.num_text], self.qkv[self.num_text :]
        parts = []
        for stream, rows in ((text, shard.text), (image, shard.image)):
            wide = poisoned(len(rows) + padding, stream.shape[1] + 64, dtype=stream.dtype)
            wide[: len(rows), : stream.shape[1]] = stream[rows.start : rows.stop]
            parts.append(wide[:, : stream.shape[1]])
        return (parts[0], self.norms[0], self.norms[1]), (parts[1], self.norms[2], self.norms[3])

    def expected(self) -> list[Tensor]:
        """q, k, v of all tokens and heads, fp32."""
        cos, sin = (x.repeat_interleave(2, dim=1) for x in self.rope)
        halves = []
        for rows, first in ((slice(0, self.num_text), 0), (slice(self.num_text, None), 2)):
            q_norm, k_norm = self.norms[first].float(), self.norms[first + 1].float()
            if len(self.qkv[rows]):
                halves.append(reference.qk_norm_rope(self.qkv[rows].float(), q_norm, k_norm, cos[rows], sin[rows]))
        return [torch.cat(parts) for parts in zip(*halves, strict=True)]


def _push(sequence: Sequence, slabs: GroupSlabs, padding: int = 0) -> None:
    for shard in slabs.plan.shards:
        qk_norm_rope_push(
            *sequence.streams(shard, padding),
            sequence.rope,
            slabs.table(shard.rank),
            slabs.bases,
            slabs.offsets,
            degree=slabs.plan.degree,
            num_heads=sequence.num_heads,
        )


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(("members", "num_text", "num_image", "num_heads", "head_dim"), GROUPS)
def test_slabs_hold_what_the_reference_computes(
    device, dtype, members, num_text, num_image, num_heads, head_dim, padding
) -> None:
    sequence = Sequence(num_text, num_image, num_heads, head_dim, dtype)
    slabs = GroupSlabs(make_plan(members, num_text, num_image, num_heads), head_dim, dtype)
    _push(sequence, slabs, padding)
    q, k, v = sequence.expected()
    for shard in slabs.plan.shards:
        heads = slice(shard.heads.start, shard.heads.stop)
        pushed_q, pushed_k, pushed_v = slabs.take_qkv(shard.rank)
        assert_close(pushed_q, q[:, heads])
        assert_close(pushed_k, k[:, heads])
        assert torch.equal(pushed_v.float(), v[:, heads])
    slabs.assert_untouched()


def test_bits_do_not_depend_on_the_group(device, dtype) -> None:
    sequence = Sequence(9, 50, 6, 64, dtype)
    alone = GroupSlabs(make_plan((0,), 9, 50, 6), 64, dtype)
    _push(sequence, alone)
    whole = alone.take_qkv(0)
    for members in ((0, 1), (2, 1, 0), (3, 0, 1, 2)):
        slabs = GroupSlabs(make_plan(members, 9, 50, 6), 64, dtype)
        _push(sequence, slabs)
        for shard in slabs.plan.shards:
            for part, all_heads in zip(slabs.take_qkv(shard.rank), whole, strict=True):
                assert torch.equal(part, all_heads[:, shard.heads.start : shard.heads.stop])


def test_strided_rope_and_both_streams_in_one_tensor(device, dtype) -> None:
    """Single blocks: one projection, text rows first; diffusers' tables hold each angle twice."""
    sequence = Sequence(6, 20, 4, 32, dtype)
    cos, sin = (x.repeat_interleave(2, dim=1)[:, ::2] for x in sequence.rope)
    q_norm, k_norm = sequence.norms[:2]
    sequence.norms = [q_norm, k_norm, q_norm, k_norm]
    slabs = GroupSlabs(make_plan((1,), 6, 20, 4), 32, dtype)
    projection = sequence.qkv.view(26, 3, 4, 32)
    text, image = (projection[:6], q_norm, k_norm), (projection[6:], q_norm, k_norm)
    qk_norm_rope_push(text, image, (cos, sin), slabs.table(0), slabs.bases, slabs.offsets, degree=1, num_heads=4)
    for pushed, expected in zip(slabs.take_qkv(0), sequence.expected(), strict=True):
        assert_close(pushed, expected)
    slabs.assert_untouched()
