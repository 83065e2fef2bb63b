"""x + gate · y, the end of every transformer sub-block.

Owns the arithmetic of `reference.gated_residual`: in fp32, rounded once. Elementwise, hence row-exact.
"""

import triton
import triton.language as tl
from torch import Tensor

from tetrion.kernels.step_row import step_row

BLOCK = 1024
NUM_WARPS = 4


def gated_residual(
    x: Tensor, gate: Tensor, y: Tensor, *, step: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x + gate · y.

    x, y, out: [n, C], rows may be strided; `out` may be x or y itself. gate: [C]; with `step` (int32 [1] on the
    device) a table [steps, C] of which that row is used. Returns `out`, by default a new tensor like x.
    """
    num_rows, width = x.shape
    out = x.new_empty(num_rows, width) if out is None else out
    assert y.shape == out.shape == x.shape, f"{x.shape}, {y.shape} to {out.shape}"
    assert x.stride(1) == y.stride(1) == out.stride(1) == 1, "columns must be contiguous"
    gate, gate_stride = step_row(gate, width, step)
    if num_rows:
        _kernel[(num_rows, triton.cdiv(width, BLOCK))](
            x,
            gate,
            y,
            out,
            step,
            x.stride(0),
            gate_stride,
            y.stride(0),
            out.stride(0),
            WIDTH=width,
            COLUMNS=BLOCK,
            num_warps=NUM_WARPS,
        )
    return out


@triton.jit
def _kernel(
    x,
    gate,
    y,
    out,
    step,
    x_stride,
    gate_stride,
    y_stride,
    out_stride,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column_C = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside_C = column_C < WIDTH
    if step is not None:
        gate += tl.load(step) * gate_stride
    x_C = tl.load(x + row * x_stride + column_C, mask=inside_C).to(tl.float32)
    y_C = tl.load(y + row * y_stride + column_C, mask=inside_C).to(tl.float32)
    gate_C = tl.load(gate + column_C, mask=inside_C).to(tl.float32)
    tl.store(out + row * out_stride + column_C, (x_C + gate_C * y_C).to(out.dtype.element_ty), mask=inside_C)
