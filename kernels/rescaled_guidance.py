"""Guidance that keeps the length of the prompt's own velocity, row by row.

Owns the arithmetic of `reference.rescaled_guidance`, in fp32. A program has whole rows, whose sums are added in one
fixed order: row-exact.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tetrion.kernels.reference import LEAST_NORM

TILE = 1024
NUM_WARPS = 4


def rescaled_guidance(velocity: Tensor, negative: Tensor, guidance: Tensor, step: Tensor) -> Tensor:
    """A new fp32 [n, C]. velocity, negative: [n, C] of one float type, contiguous; guidance: fp32 [steps]; step: int32
    [1], which of them holds."""
    assert velocity.shape == negative.shape and velocity.dtype == negative.dtype, f"{negative.dtype} {negative.shape}"
    assert velocity.is_contiguous() and negative.is_contiguous(), "tensors must be contiguous"
    assert guidance.dtype == torch.float32 and step.dtype == torch.int32, f"{guidance.dtype}, step of {step.dtype}"
    num_rows, width = velocity.shape
    out = velocity.new_empty(num_rows, width, dtype=torch.float32)
    columns = triton.next_power_of_2(width)
    rows = max(1, TILE // columns)
    if num_rows:
        _kernel[(triton.cdiv(num_rows, rows),)](
            velocity,
            negative,
            guidance,
            step,
            out,
            num_rows,
            WIDTH=width,
            ROWS=rows,
            COLUMNS=columns,
            LEAST=LEAST_NORM,
            num_warps=NUM_WARPS,
        )
    return out


@triton.jit
def _kernel(
    velocity,
    negative,
    guidance,
    step,
    out,
    num_rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LEAST: tl.constexpr,
):
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column_C = tl.arange(0, COLUMNS)
    index_RC = row_R[:, None] * WIDTH + column_C[None, :]
    inside_RC = (row_R[:, None] < num_rows) & (column_C[None, :] < WIDTH)
    own_RC = tl.load(velocity + index_RC, mask=inside_RC, other=0.0).to(tl.float32)
    negative_RC = tl.load(negative + index_RC, mask=inside_RC, other=0.0).to(tl.float32)
    factor_RC = tl.load(guidance + tl.load(step)) + tl.zeros_like(own_RC)
    mixed_RC = tl.fma(factor_RC, own_RC - negative_RC, negative_RC)
    own_R = tl.sqrt(tl.sum(own_RC * own_RC, axis=1))
    mixed_R = tl.sqrt(tl.sum(mixed_RC * mixed_RC, axis=1))
    scale_R = own_R / tl.maximum(mixed_R, LEAST)
    tl.store(out + index_RC, mixed_RC * scale_R[:, None], mask=inside_RC)
