"""Fused attention without a mask, forward only (FlashAttention-2, arXiv:2307.08691).

Owns the arithmetic of `reference.attention`; knows no groups and no slabs.

A program takes BLOCK_M queries of one head and walks over all keys, BLOCK_N at a time, in token order: running row
maximum and row sum, both of base-2 exponents. The last, partial block of keys runs through the same body with a mask.
Tensors are read and written through descriptors (TMA on Hopper) over [tokens, heads · D], so that the exchange's
[L, h, D] needs no transpose; rows beyond the last token read as zero and are not written.

A row's bits depend on its query, the keys and values in their order, and the tile: see attention_tiles.py.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tetrion.kernels.attention_tiles import Tile, tile_for

DESCRIPTOR_ALIGNMENT = 16
LOG2_E = math.log2(math.e)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out: Tensor | None = None,
    log_sum_exp: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """softmax(q kᵀ / √D) v per head.

    q, k, v, out: [L, h, D], of k and v perhaps other L; D of 32, 64 or 128, bf16, fp16 or fp32 (full precision, slow),
        any strides of tokens and heads that are multiples of 16 bytes; D is contiguous. k and v may have fewer heads
        than q, each of which as many consecutive ones of q share. log_sum_exp, if given: fp32 [h, L], gets the
        logarithm of each row's softmax denominator (natural, of scaled scores). tile: for tuning.
    Returns `out`, by default a new contiguous tensor.

    Raises ValueError for another head dim or dtype.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_keys, heads_per_key = len(k), num_heads // k.shape[1]
    keys = num_keys, num_heads // heads_per_key, head_dim
    assert num_tokens > 0 and num_keys > 0 and k.shape == v.shape == keys, f"{q.shape}, {k.shape}, {v.shape}"
    assert num_heads % heads_per_key == 0, f"{num_heads} heads over {k.shape[1]}"
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    assert out.shape == q.shape and out.dtype == q.dtype == k.dtype == v.dtype, f"{q.dtype} {q.shape} to {out.shape}"
    if log_sum_exp is not None:
        assert log_sum_exp.shape == (num_heads, num_tokens) and log_sum_exp.is_contiguous(), "log-sum-exp's shape"
    tile = tile_for(num_tokens, head_dim, q.element_size()) if tile is None else tile
    grid = (triton.cdiv(num_tokens, tile.block_m), num_heads)
    _kernel[grid](
        _rows(q, tile.block_m),
        _rows(k, tile.block_n),
        _rows(v, tile.block_n),
        _rows(out, tile.block_m),
        log_sum_exp,
        q.stride(1),
        k.stride(1),
        v.stride(1),
        out.stride(1),
        num_tokens,
        num_keys,
        LOG2_E / math.sqrt(head_dim),
        HEADS_PER_KEY=heads_per_key,
        HEAD_DIM=head_dim,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        HAS_TAIL=num_keys % tile.block_n != 0,
        FULL_PRECISION=q.dtype == torch.float32 or triton.knobs.runtime.interpret,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def _rows(x: Tensor, block: int) -> TensorDescriptor:
    """[L, h, D] as a matrix of L rows in which head i begins at column i · (stride of heads)."""
    num_tokens, num_heads, head_dim = x.shape
    token_stride, head_stride, element_stride = x.stride()
    aligned = all(stride * x.element_size() % DESCRIPTOR_ALIGNMENT == 0 for stride in (token_stride, head_stride))
    assert element_stride == 1 and aligned, f"strides {x.stride()} of {x.dtype} are not aligned"
    width = (num_heads - 1) * head_stride + head_dim
    return TensorDescriptor(x, [num_tokens, width], [token_stride, 1], [block, head_dim])


@triton.jit
def _kernel(
    q,
    k,
    v,
    out,
    log_sum_exp,
    q_head_stride,
    k_head_stride,
    v_head_stride,
    out_head_stride,
    num_tokens,
    num_keys,
    scale,
    HEADS_PER_KEY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    FULL_PRECISION: tl.constexpr,
):
    """`scale`: log2(e) / √D."""
    first = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1)
    q_MD = q.load([first, head * q_head_stride])
    maximum_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    out_MD = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    key_head = head // HEADS_PER_KEY
    k_column, v_column = key_head * k_head_stride, key_head * v_head_stride

    full = num_keys - num_keys % BLOCK_N
    for start in tl.range(0, full, BLOCK_N):
        out_MD, maximum_M, sum_M = _turn(
            q_MD, k, v, out_MD, maximum_M, sum_M, start, k_column, v_column, num_keys, scale,
            BLOCK_N, False, FULL_PRECISION,
        )  # fmt: skip
    if HAS_TAIL:
        out_MD, maximum_M, sum_M = _turn(
            q_MD, k, v, out_MD, maximum_M, sum_M, full, k_column, v_column, num_keys, scale,
            BLOCK_N, True, FULL_PRECISION,
        )  # fmt: skip

    out_MD = out_MD / sum_M[:, None]
    out.store([first, head * out_head_stride], out_MD.to(q_MD.dtype))
    if log_sum_exp is not None:
        row_M = first + tl.arange(0, BLOCK_M)
        natural_M = (maximum_M + tl.log2(sum_M)) * 0.6931471805599453
        tl.store(log_sum_exp + head * num_tokens + row_M, natural_M, mask=row_M < num_tokens)


@triton.jit
def _turn(
    q_MD,
    k,
    v,
    out_MD,
    maximum_M,
    sum_M,
    start,
    k_column,
    v_column,
    num_keys,
    scale,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    FULL_PRECISION: tl.constexpr,
):
    """One block of keys and values. Returns the new out, maximum and sum."""
    k_ND = k.load([start, k_column])
    score_MN = _dot(q_MD, k_ND.T, None, FULL_PRECISION)
    if MASKED:
        inside_N = start + tl.arange(0, BLOCK_N) < num_keys
        score_MN = tl.where(inside_N[None, :], score_MN, float("-inf"))
    new_maximum_M = tl.maximum(maximum_M, tl.max(score_MN, 1) * scale)
    weight_MN = tl.exp2(score_MN * scale - new_maximum_M[:, None])
    shrink_M = tl.exp2(maximum_M - new_maximum_M)
    sum_M = sum_M * shrink_M + tl.sum(weight_MN, 1)
    out_MD = out_MD * shrink_M[:, None]
    v_ND = v.load([start, v_column])
    out_MD = _dot(weight_MN.to(v_ND.dtype), v_ND, out_MD, FULL_PRECISION)
    return out_MD, new_maximum_M, sum_M


@triton.jit
def _dot(a, b, accumulator, FULL_PRECISION: tl.constexpr):
    """Full precision also serves the interpreter, whose dot of 16-bit operands is wrong."""
    if FULL_PRECISION:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    else:
        return tl.dot(a, b, accumulator)
