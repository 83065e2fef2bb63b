"""The second half of Ulysses' exchange (arXiv:2309.14509): attention's output goes to the owners of the tokens.

Owns where each piece is stored; knows no barriers and no arithmetic.

This member has [all tokens, its heads, D] in canonical order. Member j's output region is [tokens of j, H · D], its
text first. A program copies ROWS consecutive (token, head) pairs of one destination; loads are contiguous, stores are
runs of (own heads) · D elements. Consecutive programs go to different destinations, beginning with oneself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tetrion.kernels.group_table import (
    device_of,
    head_range,
    image_range,
    num_text_tokens,
    num_words,
    own_rank,
    slab_pointer,
    text_range,
)

TILE_ELEMENTS = 4096
NUM_WARPS = 4


def output_push(
    output: Tensor,
    table: Tensor,
    bases: Tensor,
    offset: int,
    *,
    degree: int,
    num_heads: int,
    num_text: int,
    image_row: int | None = None,
) -> None:
    """Store this member's heads of every token in the output region of the token's owner.

    output: [all tokens, own heads, D], any strides with contiguous D.
    table, bases: as in qk_norm_rope_push.
    offset: of the output region in every slab, in bytes.
    image_row: the row of a member's region at which its image tokens begin; None: right after its text tokens. (Graphs
        that pad uneven splits want ceil(num_text / degree) whatever the rank.)
    """
    num_tokens, own_heads, head_dim = output.shape
    assert output.stride(2) == 1, f"strides {output.stride()}"
    assert own_heads <= triton.cdiv(num_heads, degree), f"{own_heads} of {num_heads} heads at degree {degree}"
    assert table.dtype == torch.int32 and len(table) >= num_words(degree), f"{len(table)} words for degree {degree}"
    assert offset % 16 == 0, f"region at {offset} is not aligned"
    rows = TILE_ELEMENTS // head_dim
    text_blocks, image_blocks = (
        triton.cdiv(triton.cdiv(tokens, degree) * own_heads, rows) for tokens in (num_text, num_tokens - num_text)
    )
    _kernel[(degree * (text_blocks + image_blocks),)](
        output,
        table,
        bases,
        offset // output.element_size(),
        output.stride(0),
        output.stride(1),
        text_blocks,
        -1 if image_row is None else image_row,
        DEGREE=degree,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        ROWS=rows,
        num_warps=NUM_WARPS,
    )


@triton.jit
def _kernel(
    output,
    table,
    bases,
    offset,
    token_stride,
    head_stride,
    text_blocks,
    image_row,
    DEGREE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    rank = own_rank(table)
    peer = (rank + program % DEGREE) % DEGREE
    block = program // DEGREE
    text_start, text_stop = text_range(table, peer, DEGREE)
    if block < text_blocks:
        start, stop = text_start, text_stop
        canonical = start
        target_row = start * 0
    else:
        start, stop = image_range(table, peer, DEGREE)
        canonical = start + num_text_tokens(table, DEGREE)
        target_row = tl.where(image_row < 0, text_stop - text_start, image_row)
        block -= text_blocks

    first_head, end_head = head_range(table, rank, DEGREE)
    heads = end_head - first_head
    pair_R = block * ROWS + tl.arange(0, ROWS)
    inside_R1 = (pair_R < (stop - start) * heads)[:, None]
    token_R = pair_R // heads
    head_R = pair_R - token_R * heads
    dim_D = tl.arange(0, HEAD_DIM)

    source_R = (canonical + token_R).to(tl.int64) * token_stride + head_R * head_stride
    value_RD = tl.load(output + source_R[:, None] + dim_D[None, :], mask=inside_R1)
    slab = slab_pointer(bases, device_of(table, peer), output.dtype.element_ty)
    target_R = ((target_row + token_R) * NUM_HEADS + first_head + head_R) * HEAD_DIM
    tl.store(slab + offset + target_R[:, None] + dim_D[None, :], value_RD, mask=inside_R1)
