"""GELU's tanh approximation (arXiv:1606.08415), written where it is needed next.

Owns the arithmetic of `reference.gelu_tanh`: in fp32, rounded once. Elementwise, hence row-exact. `out` may be a column
slice of a wider tensor (a single block's [attention | MLP] input), which saves the concatenation.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
NUM_WARPS = 4
TWICE = 2 * math.sqrt(2 / math.pi)


def gelu(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x, out: [n, C], rows may be strided; `out` may be x itself. Returns `out`, by default a new tensor."""
    num_rows, width = x.shape
    out = x.new_empty(num_rows, width) if out is None else out
    assert out.shape == x.shape and x.stride(1) == out.stride(1) == 1, f"{x.shape} to {out.shape}"
    if num_rows:
        _kernel[(num_rows, triton.cdiv(width, BLOCK))](
            x, out, x.stride(0), out.stride(0), WIDTH=width, COLUMNS=BLOCK, SLOPE=TWICE, num_warps=NUM_WARPS
        )
    return out


@triton.jit
def _kernel(x, out, x_stride, out_stride, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, SLOPE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column_C = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside_C = column_C < WIDTH
    x_C = tl.load(x + row * x_stride + column_C, mask=inside_C, other=0.0).to(tl.float32)
    denominator_C = 1 + tl.exp(-SLOPE * (x_C + 0.044715 * x_C * x_C * x_C))
    tl.store(out + row * out_stride + column_C, (x_C / denominator_C).to(out.dtype.element_ty), mask=inside_C)
