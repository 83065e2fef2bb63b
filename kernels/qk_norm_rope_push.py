"""q/k RMSNorm, the rotary embedding and the first half of Ulysses' exchange (arXiv:2309.14509), in one pass.

Owns the arithmetic of `reference.qk_norm_rope` and where each head slice is stored; knows no barriers.

Attention is over some of the sequence's segments, in canonical order; each is a *piece* of its own, with its own
weights. The slab of member j holds q, k, v as [all rows of those segments, heads of j, D]. What this member's rows of a
segment contribute to it is one contiguous piece of each region, so a program takes ROWS consecutive (row, head) pairs
of one destination, the whole head dimension of each: its stores are contiguous, its loads are runs of (heads of j) · D
elements. Consecutive programs go to different destinations, beginning with oneself, so that all links and the local
memory are busy at once. The first piece's programs come first. Where several heads of queries share one of keys and
values, pairs are of the latter, each with its queries.

Sums stay within a row, in fp32, rounded once at the end: a row's bits depend neither on the degree nor on the split.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tetrion.kernels.chunk_words import is_live, member_of, own_rank
from tetrion.kernels.group_table import (
    MAX_SEGMENTS,
    head_range,
    num_words,
    rows_before,
    segment_count,
    segment_range,
    slab_pointer,
)
from tetrion.kernels.reference import EPS

TILE_ELEMENTS = 4096
NUM_WARPS = 4


class Piece(NamedTuple):
    """This member's rows of a segment.

    qkv: [n, (H + 2 · K) · D], K heads of keys and values; a row's elements are contiguous, rows may be strided (a slice
    of a wider projection, or of one tensor that holds several segments). Rows beyond the member's share are padding.
    q_norm, k_norm: weights of RMSNorm over a head, [D]; None: not normed.
    """

    qkv: Tensor
    segment: int
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    has_rope: bool = True
    epsilon: float = EPS


NO_PIECE = (None, None, None, 0)


def qk_norm_rope_push(
    pieces: Sequence[Piece],
    rope: tuple[Tensor, Tensor] | None,
    table: Tensor,
    chunk: Tensor,
    status: Tensor,
    bases: Tensor,
    offsets: tuple[int, int, int],
    *,
    degree: int,
    num_heads: int,
    head_dim: int,
    heads_per_key: int = 1,
) -> None:
    """Store this member's rows, normed and turned, in every member's q, k and v regions.

    pieces: of the segments that attention is over, in canonical order, of one dtype.
    rope: cos and sin of the whole sequence in canonical order, [rows, D / 2] each, fp32, one value a pair. (Of
        diffusers' tables, which hold each value twice: `cos[:, ::2]`; contiguous is faster.) None if no piece has any.
    table: the group, see group_table.py; chunk: its members, see chunk_words.py; int32.
    status: see slot_version.py.
    bases: address of each device's slab by device id; int64, on this device.
    offsets: of the q, k and v regions in every slab, in bytes.
    heads_per_key: so many heads of queries share one of keys and values.
    """
    num_key_heads = num_heads // heads_per_key
    _check(pieces, rope, table, offsets, degree, num_heads + 2 * num_key_heads, head_dim)
    rows = TILE_ELEMENTS // head_dim
    most_heads = triton.cdiv(num_key_heads, degree)
    blocks = [triton.cdiv(len(piece.qkv) * most_heads, rows) for piece in pieces]
    if not sum(blocks):
        return
    missing = MAX_SEGMENTS.value - len(pieces)
    tensors = [(piece.qkv, piece.q_norm, piece.k_norm, piece.qkv.stride(0)) for piece in pieces]
    segments = [piece.segment for piece in pieces] + [0] * missing
    turned = [piece.has_rope for piece in pieces] + [False] * missing
    epsilons = [piece.epsilon for piece in pieces] + [0.0] * missing
    cos, sin = (None, None) if rope is None else rope
    _kernel[(degree * sum(blocks),)](
        *(argument for piece in (*tensors, *[NO_PIECE] * missing) for argument in piece),
        cos,
        sin,
        table,
        chunk,
        status,
        bases,
        *(offset // pieces[0].qkv.element_size() for offset in offsets),
        *((0, 0) if cos is None else cos.stride()),
        blocks[0],
        sum(blocks[:2]),
        *segments,
        *turned,
        *epsilons,
        DEGREE=degree,
        NUM_HEADS=num_heads,
        HEADS_PER_KEY=heads_per_key,
        HEAD_DIM=head_dim,
        ROWS=rows,
        num_warps=NUM_WARPS,
    )


def _check(
    pieces: Sequence[Piece],
    rope: tuple[Tensor, Tensor] | None,
    table: Tensor,
    offsets: tuple[int, int, int],
    degree: int,
    all_heads: int,
    head_dim: int,
) -> None:
    """`all_heads`: of queries, keys and values together."""
    segments = [piece.segment for piece in pieces]
    assert segments == sorted(set(segments)) and 1 <= len(pieces) <= MAX_SEGMENTS.value, f"segments {segments}"
    for qkv, _, q_norm, k_norm, has_rope, _ in pieces:
        assert qkv.dtype == pieces[0].qkv.dtype, f"pieces of {qkv.dtype} and {pieces[0].qkv.dtype}"
        assert qkv[:1].numel() == min(len(qkv), 1) * all_heads * head_dim, f"{tuple(qkv.shape)} is no qkv"
        assert qkv[:1].is_contiguous() or not len(qkv), "a row's q, k, v must be contiguous"
        assert all(norm is None or norm.shape == (head_dim,) for norm in (q_norm, k_norm)), "norm weights' shape"
        assert rope is not None or not has_rope, "no rotary tables"
    for part in rope or ():
        assert part.shape[1] == head_dim // 2 and part.dtype == torch.float32, f"rope of {part.dtype} {part.shape}"
    assert rope is None or (rope[0].shape, rope[0].stride()) == (rope[1].shape, rope[1].stride()), "rope's shapes"
    assert table.dtype == torch.int32 and len(table) >= num_words(degree), f"{len(table)} words for degree {degree}"
    assert all(offset % 16 == 0 for offset in offsets), f"regions at {offsets} are not aligned"


@triton.jit(do_not_specialize=["block_1", "block_2"])
def _kernel(
    qkv_0,
    q_norm_0,
    k_norm_0,
    stride_0,
    qkv_1,
    q_norm_1,
    k_norm_1,
    stride_1,
    qkv_2,
    q_norm_2,
    k_norm_2,
    stride_2,
    cos,
    sin,
    table,
    chunk,
    status,
    bases,
    q_offset,
    k_offset,
    v_offset,
    rope_stride,
    rope_pair_stride,
    block_1,
    block_2,
    SEGMENT_0: tl.constexpr,
    SEGMENT_1: tl.constexpr,
    SEGMENT_2: tl.constexpr,
    HAS_ROPE_0: tl.constexpr,
    HAS_ROPE_1: tl.constexpr,
    HAS_ROPE_2: tl.constexpr,
    EPSILON_0: tl.constexpr,
    EPSILON_1: tl.constexpr,
    EPSILON_2: tl.constexpr,
    DEGREE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS_PER_KEY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`block_i`: a destination's program with which piece i begins."""
    program = tl.program_id(0)
    rank = own_rank(chunk)
    peer = (rank + program % DEGREE) % DEGREE
    block = program // DEGREE
    first_head, end_head = head_range(table, peer, DEGREE)
    first_head //= HEADS_PER_KEY
    heads = end_head // HEADS_PER_KEY - first_head
    live = is_live(chunk, status)
    slab = slab_pointer(bases, member_of(chunk, peer), qkv_0.dtype.element_ty)
    if block < block_1:
        _push(
            qkv_0, q_norm_0, k_norm_0, stride_0, cos, sin, table, slab, q_offset, k_offset, v_offset, rope_stride,
            rope_pair_stride, block, rank, first_head, heads, live, 0, SEGMENT_0, HAS_ROPE_0, EPSILON_0, DEGREE,
            NUM_HEADS, HEADS_PER_KEY, HEAD_DIM, ROWS,
        )  # fmt: skip
    elif block < block_2:
        if qkv_1 is not None:
            target_row = segment_count(table, SEGMENT_0, DEGREE)
            _push(
                qkv_1, q_norm_1, k_norm_1, stride_1, cos, sin, table, slab, q_offset, k_offset, v_offset, rope_stride,
                rope_pair_stride, block - block_1, rank, first_head, heads, live, target_row, SEGMENT_1, HAS_ROPE_1,
                EPSILON_1, DEGREE, NUM_HEADS, HEADS_PER_KEY, HEAD_DIM, ROWS,
            )  # fmt: skip
    else:
        if qkv_2 is not None:
            target_row = segment_count(table, SEGMENT_0, DEGREE) + segment_count(table, SEGMENT_1, DEGREE)
            _push(
                qkv_2, q_norm_2, k_norm_2, stride_2, cos, sin, table, slab, q_offset, k_offset, v_offset, rope_stride,
                rope_pair_stride, block - block_2, rank, first_head, heads, live, target_row, SEGMENT_2, HAS_ROPE_2,
                EPSILON_2, DEGREE, NUM_HEADS, HEADS_PER_KEY, HEAD_DIM, ROWS,
            )  # fmt: skip


@triton.jit
def _push(
    qkv,
    q_norm,
    k_norm,
    stride,
    cos,
    sin,
    table,
    slab,
    q_offset,
    k_offset,
    v_offset,
    rope_stride,
    rope_pair_stride,
    block,
    rank,
    first_head,
    heads,
    live,
    target_row,
    SEGMENT: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    EPSILON: tl.constexpr,
    DEGREE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS_PER_KEY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A block of a piece. `target_row`: at which its segment begins in the regions. `first_head`, `heads`: of keys and
    values."""
    start, stop = segment_range(table, SEGMENT, rank, DEGREE)
    pair_R = block * ROWS + tl.arange(0, ROWS)
    inside_R1 = (live & (pair_R < (stop - start) * heads))[:, None]
    row_R = pair_R // heads
    head_R = first_head + pair_R - row_R * heads
    dim_D = tl.arange(0, HEAD_DIM)

    source_R = row_R.to(tl.int64) * stride + head_R * HEADS_PER_KEY * HEAD_DIM
    source_RD = qkv + source_R[:, None] + dim_D[None, :]
    key_R = row_R.to(tl.int64) * stride + head_R * HEAD_DIM
    key_RD = qkv + key_R[:, None] + dim_D[None, :]
    q_RD = tl.load(source_RD, mask=inside_R1, other=0.0)
    k_RD = tl.load(key_RD + NUM_HEADS * HEAD_DIM, mask=inside_R1, other=0.0)
    v_RD = tl.load(key_RD + (NUM_HEADS + NUM_HEADS // HEADS_PER_KEY) * HEAD_DIM, mask=inside_R1, other=0.0)
    dtype = q_RD.dtype
    q_RD = _normed(q_RD, q_norm, HEAD_DIM, EPSILON)
    k_RD = _normed(k_RD, k_norm, HEAD_DIM, EPSILON)
    if HAS_ROPE:
        half_d = tl.arange(0, HEAD_DIM // 2)
        canonical_R = rows_before(table, SEGMENT, DEGREE) + start + row_R
        rope_Rd = (canonical_R * rope_stride)[:, None] + (half_d * rope_pair_stride)[None, :]
        cos_Rd = tl.load(cos + rope_Rd, mask=inside_R1, other=0.0)
        sin_Rd = tl.load(sin + rope_Rd, mask=inside_R1, other=0.0)
        q_RD = _turned(q_RD, cos_Rd, sin_Rd, ROWS, HEAD_DIM)
        k_RD = _turned(k_RD, cos_Rd, sin_Rd, ROWS, HEAD_DIM)

    target_R = (target_row + start) * heads + pair_R
    target_RD = (target_R * HEAD_DIM)[:, None] + dim_D[None, :]
    query_RD = (target_R * HEADS_PER_KEY * HEAD_DIM)[:, None] + dim_D[None, :]
    tl.store(slab + q_offset + query_RD, q_RD.to(dtype), mask=inside_R1)
    tl.store(slab + k_offset + target_RD, k_RD.to(dtype), mask=inside_R1)
    tl.store(slab + v_offset + target_RD, v_RD, mask=inside_R1)

    for query in tl.static_range(1, HEADS_PER_KEY):
        more_RD = tl.load(source_RD + query * HEAD_DIM, mask=inside_R1, other=0.0)
        more_RD = _normed(more_RD, q_norm, HEAD_DIM, EPSILON)
        if HAS_ROPE:
            more_RD = _turned(more_RD, cos_Rd, sin_Rd, ROWS, HEAD_DIM)
        tl.store(slab + q_offset + query_RD + query * HEAD_DIM, more_RD.to(dtype), mask=inside_R1)


@triton.jit
def _normed(x_RD, weight, HEAD_DIM: tl.constexpr, EPSILON: tl.constexpr):
    """fp32."""
    x_RD = x_RD.to(tl.float32)
    if weight is not None:
        scale_R = tl.rsqrt(tl.sum(x_RD * x_RD, 1) / HEAD_DIM + EPSILON)
        weight_D = tl.load(weight + tl.arange(0, HEAD_DIM)).to(tl.float32)
        x_RD = x_RD * scale_R[:, None] * weight_D[None, :]
    return x_RD


@triton.jit
def _turned(x_RD, cos_Rd, sin_Rd, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    even_Rd, odd_Rd = tl.split(tl.reshape(x_RD, (ROWS, HEAD_DIM // 2, 2)))
    turned_Rd2 = tl.join(even_Rd * cos_Rd - odd_Rd * sin_Rd, odd_Rd * cos_Rd + even_Rd * sin_Rd)
    return tl.reshape(turned_Rd2, (ROWS, HEAD_DIM))
