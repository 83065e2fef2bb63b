"""q/k RMSNorm, FLUX's rotary embedding and the first half of Ulysses' exchange (arXiv:2309.14509), in one pass.

Owns the arithmetic of `reference.qk_norm_rope` and where each head slice is stored; knows no barriers.

The slab of member j holds q, k, v as [all tokens, heads of j, D] in canonical order (all text, then all image). What
this member's consecutive tokens contribute to it is one contiguous piece of each region, so a program takes ROWS
consecutive (token, head) pairs of one destination, the whole head dimension of each: its stores are contiguous, its
loads are runs of (heads of j) · D elements. Consecutive programs go to different destinations, beginning with oneself,
so that all links and the local memory are busy at once. Text's programs come first, then image's.

Sums stay within a row, in fp32, rounded once at the end: a token's bits depend neither on the degree nor on the split.
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
from tetrion.kernels.reference import EPS

TILE_ELEMENTS = 4096
NUM_WARPS = 4

StreamTensors = tuple[Tensor, Tensor, Tensor]
"""qkv of a stream's local tokens, [n, 3, H, D] or [n, 3 · H · D]; q's norm weight [D]; k's norm weight [D]."""


def qk_norm_rope_push(
    text: StreamTensors,
    image: StreamTensors,
    rope: tuple[Tensor, Tensor],
    table: Tensor,
    bases: Tensor,
    offsets: tuple[int, int, int],
    *,
    degree: int,
    num_heads: int,
) -> None:
    """Store this member's tokens, normed and turned, in every member's q, k and v regions.

    text, image: as StreamTensors. One dtype; a token's 3 · H · D elements are contiguous, rows may be strided (a slice
        of a wider projection, or of one tensor that holds both streams). Rows beyond the member's share are padding.
    rope: cos and sin, [all tokens, D / 2] in canonical order, fp32, one value a pair. (Of diffusers' tables, which hold
        each value twice: `cos[:, ::2]`; contiguous is faster.)
    table: the group, see group_table.py; int32.
    bases: address of each device's slab by device id; int64, on this device.
    offsets: of the q, k and v regions in every slab, in bytes.
    """
    head_dim = image[1].shape[0]
    _check(text, image, rope, table, offsets, degree, num_heads)
    rows = TILE_ELEMENTS // head_dim
    most_heads = triton.cdiv(num_heads, degree)
    text_blocks, image_blocks = (triton.cdiv(len(stream[0]) * most_heads, rows) for stream in (text, image))
    cos, sin = rope
    _kernel[(degree * (text_blocks + image_blocks),)](
        *text,
        *image,
        cos,
        sin,
        table,
        bases,
        *(offset // image[0].element_size() for offset in offsets),
        text[0].stride(0),
        image[0].stride(0),
        cos.stride(0),
        cos.stride(1),
        text_blocks,
        DEGREE=degree,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        ROWS=rows,
        EPSILON=EPS,
        num_warps=NUM_WARPS,
    )


def _check(
    text: StreamTensors,
    image: StreamTensors,
    rope: tuple[Tensor, Tensor],
    table: Tensor,
    offsets: tuple[int, int, int],
    degree: int,
    num_heads: int,
) -> None:
    head_dim = image[1].shape[0]
    for qkv, q_norm, k_norm in (text, image):
        assert qkv.dtype == image[0].dtype, f"streams of {qkv.dtype} and {image[0].dtype}"
        assert qkv[:1].numel() == min(len(qkv), 1) * 3 * num_heads * head_dim, f"{tuple(qkv.shape)} is no qkv"
        assert qkv[:1].is_contiguous() or not len(qkv), "a token's q, k, v must be contiguous"
        assert q_norm.shape == k_norm.shape == (head_dim,), f"norm weights {q_norm.shape}, {k_norm.shape}"
    cos, sin = rope
    assert cos.shape == sin.shape and cos.shape[1] == head_dim // 2 and cos.stride() == sin.stride(), "rope's shape"
    assert cos.dtype == sin.dtype == torch.float32, f"rope of {cos.dtype}"
    assert table.dtype == torch.int32 and len(table) >= num_words(degree), f"{len(table)} words for degree {degree}"
    assert all(offset % 16 == 0 for offset in offsets), f"regions at {offsets} are not aligned"


@triton.jit
def _kernel(
    text_qkv,
    text_q_norm,
    text_k_norm,
    image_qkv,
    image_q_norm,
    image_k_norm,
    cos,
    sin,
    table,
    bases,
    q_offset,
    k_offset,
    v_offset,
    text_stride,
    image_stride,
    rope_stride,
    rope_pair_stride,
    text_blocks,
    DEGREE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    EPSILON: tl.constexpr,
):
    program = tl.program_id(0)
    rank = own_rank(table)
    peer = (rank + program % DEGREE) % DEGREE
    block = program // DEGREE
    if block < text_blocks:
        qkv, q_norm, k_norm, stride = text_qkv, text_q_norm, text_k_norm, text_stride.to(tl.int64)
        start, stop = text_range(table, rank, DEGREE)
        canonical = start
    else:
        qkv, q_norm, k_norm, stride = image_qkv, image_q_norm, image_k_norm, image_stride.to(tl.int64)
        start, stop = image_range(table, rank, DEGREE)
        canonical = start + num_text_tokens(table, DEGREE)
        block -= text_blocks

    first_head, end_head = head_range(table, peer, DEGREE)
    heads = end_head - first_head
    pair_R = block * ROWS + tl.arange(0, ROWS)
    inside_R1 = (pair_R < (stop - start) * heads)[:, None]
    token_R = pair_R // heads
    head_R = first_head + pair_R - token_R * heads
    dim_D = tl.arange(0, HEAD_DIM)

    source_RD = qkv + (token_R * stride + head_R * HEAD_DIM)[:, None] + dim_D[None, :]
    q_RD = tl.load(source_RD, mask=inside_R1, other=0.0)
    k_RD = tl.load(source_RD + NUM_HEADS * HEAD_DIM, mask=inside_R1, other=0.0)
    v_RD = tl.load(source_RD + 2 * NUM_HEADS * HEAD_DIM, mask=inside_R1, other=0.0)

    half_d = tl.arange(0, HEAD_DIM // 2)
    rope_Rd = ((canonical + token_R) * rope_stride)[:, None] + (half_d * rope_pair_stride)[None, :]
    cos_Rd = tl.load(cos + rope_Rd, mask=inside_R1, other=0.0)
    sin_Rd = tl.load(sin + rope_Rd, mask=inside_R1, other=0.0)
    q_RD = _norm_rope(q_RD, tl.load(q_norm + dim_D), cos_Rd, sin_Rd, ROWS, HEAD_DIM, EPSILON)
    k_RD = _norm_rope(k_RD, tl.load(k_norm + dim_D), cos_Rd, sin_Rd, ROWS, HEAD_DIM, EPSILON)

    dtype = text_qkv.dtype.element_ty
    slab = slab_pointer(bases, device_of(table, peer), dtype)
    target_RD = ((canonical * heads + pair_R) * HEAD_DIM)[:, None] + dim_D[None, :]
    tl.store(slab + q_offset + target_RD, q_RD, mask=inside_R1)
    tl.store(slab + k_offset + target_RD, k_RD, mask=inside_R1)
    tl.store(slab + v_offset + target_RD, v_RD, mask=inside_R1)


@triton.jit
def _norm_rope(x_RD, weight_D, cos_Rd, sin_Rd, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, EPSILON: tl.constexpr):
    dtype = x_RD.dtype
    x_RD = x_RD.to(tl.float32)
    scale_R = tl.rsqrt(tl.sum(x_RD * x_RD, 1) / HEAD_DIM + EPSILON)
    x_RD = x_RD * scale_R[:, None] * weight_D.to(tl.float32)[None, :]
    even_Rd, odd_Rd = tl.split(tl.reshape(x_RD, (ROWS, HEAD_DIM // 2, 2)))
    turned_Rd2 = tl.join(even_Rd * cos_Rd - odd_Rd * sin_Rd, odd_Rd * cos_Rd + even_Rd * sin_Rd)
    return tl.reshape(turned_Rd2, (ROWS, HEAD_DIM)).to(dtype)
