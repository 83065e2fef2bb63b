"""An output gate: x · sigmoid of another layer's outputs.

Owns the arithmetic of `reference.sigmoid_product` in fp32. Elementwise, hence row-exact.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
NUM_WARPS = 4


def sigmoid_product(x: Tensor, gate: Tensor) -> Tensor:
    """[n, C] both -> a new [n, C]; rows may be apart, channels not."""
    rows, width = x.shape
    assert gate.shape == x.shape and gate.dtype == x.dtype, f"{x.dtype} {x.shape} and {gate.dtype} {gate.shape}"
    assert x.stride(1) == gate.stride(1) == 1, f"strides {x.stride()} and {gate.stride()}"
    out = x.new_empty(rows, width)
    if rows:
        grid = (rows, triton.cdiv(width, BLOCK))
        _kernel[grid](x, gate, out, x.stride(0), gate.stride(0), WIDTH=width, SIZE=BLOCK, num_warps=NUM_WARPS)
    return out


@triton.jit
def _kernel(x, gate, out, x_stride, gate_stride, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column_B = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside_B = column_B < WIDTH
    x_B = tl.load(x + row * x_stride + column_B, mask=inside_B, other=0.0).to(tl.float32)
    gate_B = tl.load(gate + row * gate_stride + column_B, mask=inside_B, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column_B, (x_B / (1 + tl.exp(-gate_B))).to(out.dtype.element_ty), mask=inside_B)
