"""A gated MLP's middle: SiLU of the first half of a GEMM's outputs, times the second half.

Owns the arithmetic of `reference.silu_product` (SwiGLU, arXiv:2002.05202) in fp32. Elementwise, hence row-exact.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
NUM_WARPS = 4


def silu_product(x: Tensor) -> Tensor:
    """[n, 2·F] -> a new [n, F]; rows may be apart, channels not."""
    rows, width = x.shape[0], x.shape[1] // 2
    assert x.shape[1] == 2 * width and x.stride(1) == 1, f"{tuple(x.shape)} of strides {x.stride()}"
    out = x.new_empty(rows, width)
    if rows:
        grid = (rows, triton.cdiv(width, BLOCK))
        _kernel[grid](x, out, x.stride(0), WIDTH=width, SIZE=BLOCK, num_warps=NUM_WARPS)
    return out


@triton.jit
def _kernel(x, out, stride, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column_B = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside_B = column_B < WIDTH
    gate_B = tl.load(x + row * stride + column_B, mask=inside_B, other=0.0).to(tl.float32)
    value_B = tl.load(x + row * stride + WIDTH + column_B, mask=inside_B, other=0.0).to(tl.float32)
    result_B = gate_B / (1 + tl.exp(-gate_B)) * value_B
    tl.store(out + row * WIDTH + column_B, result_B.to(out.dtype.element_ty), mask=inside_B)
