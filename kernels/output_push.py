"""The second half of Ulysses' exchange (arXiv:2309.14509): attention's output goes to the owners of the rows.

Owns where each piece is stored; knows no barriers and no arithmetic.

Attention was over some of the sequence's segments, in canonical order: this member has [all their rows, its heads, D].
Member j's output region is [padded rows of j, H · D], where each segment takes ⌈count / degree⌉ rows whatever the rank.
A program copies ROWS consecutive (row, head) pairs of one destination; loads are contiguous, stores are runs of
(own heads) · D elements. Consecutive programs go to different destinations, beginning with oneself.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tetrion.kernels.chunk_words import is_live, member_of, own_rank
from tetrion.kernels.group_table import (
    MAX_SEGMENTS,
    head_range,
    num_words,
    segment_count,
    segment_range,
    slab_pointer,
)

TILE_ELEMENTS = 4096
NUM_WARPS = 4


def output_push(
    output: Tensor,
    over: Sequence[int],
    padded: Sequence[int],
    table: Tensor,
    chunk: Tensor,
    status: Tensor,
    bases: Tensor,
    offset: int,
    *,
    degree: int,
    num_heads: int,
    heads_per_key: int = 1,
) -> None:
    """Store this member's heads of every row in the output region of the row's owner.

    output: [all rows of the segments, own heads, D], any strides with contiguous D.
    over, padded: the segments that attention was over, in canonical order, and a member's padded rows of each.
    table, chunk, status, bases: as in qk_norm_rope_push.
    offset: of the output region in every slab, in bytes.
    heads_per_key: so many heads are not parted.
    """
    _, own_heads, head_dim = output.shape
    assert output.stride(2) == 1, f"strides {output.stride()}"
    most_heads = triton.cdiv(num_heads // heads_per_key, degree) * heads_per_key
    assert own_heads <= most_heads, f"{own_heads} of {num_heads} heads at degree {degree}"
    assert list(over) == sorted(set(over)) and 1 <= len(over) <= MAX_SEGMENTS.value, f"segments {over}"
    assert table.dtype == torch.int32 and len(table) >= num_words(degree), f"{len(table)} words for degree {degree}"
    assert offset % 16 == 0, f"region at {offset} is not aligned"
    rows = TILE_ELEMENTS // head_dim
    blocks = [triton.cdiv(count * own_heads, rows) for count in padded]
    if not sum(blocks):
        return
    _kernel[(degree * sum(blocks),)](
        output,
        table,
        chunk,
        status,
        bases,
        offset // output.element_size(),
        output.stride(0),
        output.stride(1),
        blocks[0],
        sum(blocks[:2]),
        *over,
        *[over[-1]] * (MAX_SEGMENTS.value - len(over)),
        DEGREE=degree,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        ROWS=rows,
        num_warps=NUM_WARPS,
    )


@triton.jit(do_not_specialize=["block_1", "block_2"])
def _kernel(
    output,
    table,
    chunk,
    status,
    bases,
    offset,
    row_stride,
    head_stride,
    block_1,
    block_2,
    SEGMENT_0: tl.constexpr,
    SEGMENT_1: tl.constexpr,
    SEGMENT_2: tl.constexpr,
    DEGREE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`block_i`: a destination's program with which segment i begins."""
    program = tl.program_id(0)
    rank = own_rank(chunk)
    peer = (rank + program % DEGREE) % DEGREE
    block = program // DEGREE
    beyond_0, beyond_1 = (block >= block_1).to(tl.int32), (block >= block_2).to(tl.int32)
    count_0, count_1 = segment_count(table, SEGMENT_0, DEGREE), segment_count(table, SEGMENT_1, DEGREE)
    segment = SEGMENT_0 + beyond_0 * (SEGMENT_1 - SEGMENT_0) + beyond_1 * (SEGMENT_2 - SEGMENT_1)
    start, stop = segment_range(table, segment, peer, DEGREE)
    source_row = beyond_0 * count_0 + beyond_1 * count_1 + start
    target_row = beyond_0 * tl.cdiv(count_0, DEGREE) + beyond_1 * tl.cdiv(count_1, DEGREE)
    block -= beyond_0 * block_1 + beyond_1 * (block_2 - block_1)

    first_head, end_head = head_range(table, rank, DEGREE)
    heads = end_head - first_head
    pair_R = block * ROWS + tl.arange(0, ROWS)
    inside_R1 = (is_live(chunk, status) & (pair_R < (stop - start) * heads))[:, None]
    row_R = pair_R // heads
    head_R = pair_R - row_R * heads
    dim_D = tl.arange(0, HEAD_DIM)

    source_R = (source_row + row_R).to(tl.int64) * row_stride + head_R * head_stride
    value_RD = tl.load(output + source_R[:, None] + dim_D[None, :], mask=inside_R1)
    slab = slab_pointer(bases, member_of(chunk, peer), output.dtype.element_ty)
    target_R = ((target_row + row_R) * NUM_HEADS + first_head + head_R) * HEAD_DIM
    tl.store(slab + offset + target_R[:, None] + dim_D[None, :], value_RD, mask=inside_R1)
