"""LayerNorm without affine weights, times (1 + scale), plus shift: adaptive layer norm (DiT, arXiv:2212.09748).

Owns the arithmetic of `reference.modulate`. One program a row, sums in fp32 in one fixed order: row-exact.
"""

import triton
import triton.language as tl
from torch import Tensor

from tetrion.kernels.reference import EPS
from tetrion.kernels.step_row import step_row


def modulate(
    x: Tensor, shift: Tensor, scale: Tensor, *, step: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """LayerNorm(x) · (1 + scale) + shift.

    x, out: [n, C], rows may be strided. shift, scale: [C]; with `step` (int32 [1] on the device) tables [steps, C] of
    which that row is used. Returns `out`, by default a new tensor like x.
    """
    num_rows, width = x.shape
    out = x.new_empty(num_rows, width) if out is None else out
    assert out.shape == x.shape and x.stride(1) == out.stride(1) == 1, f"{x.shape} to {out.shape}"
    shift, shift_stride = step_row(shift, width, step)
    scale, scale_stride = step_row(scale, width, step)
    if num_rows:
        block = triton.next_power_of_2(width)
        _kernel[(num_rows,)](
            x,
            shift,
            scale,
            out,
            step,
            x.stride(0),
            shift_stride,
            scale_stride,
            out.stride(0),
            WIDTH=width,
            BLOCK=block,
            EPSILON=EPS,
            num_warps=max(1, min(8, block // 512)),
        )
    return out


@triton.jit
def _kernel(
    x,
    shift,
    scale,
    out,
    step,
    x_stride,
    shift_stride,
    scale_stride,
    out_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EPSILON: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column_C = tl.arange(0, BLOCK)
    inside_C = column_C < WIDTH
    if step is not None:
        index = tl.load(step)
        shift += index * shift_stride
        scale += index * scale_stride
    x_C = tl.load(x + row * x_stride + column_C, mask=inside_C, other=0.0).to(tl.float32)
    shift_C = tl.load(shift + column_C, mask=inside_C, other=0.0).to(tl.float32)
    scale_C = tl.load(scale + column_C, mask=inside_C, other=0.0).to(tl.float32)
    centred_C = tl.where(inside_C, x_C - tl.sum(x_C, 0) / WIDTH, 0.0)
    normed_C = centred_C * tl.rsqrt(tl.sum(centred_C * centred_C, 0) / WIDTH + EPSILON)
    result_C = normed_C * (1 + scale_C) + shift_C
    tl.store(out + row * out_stride + column_C, result_C.to(out.dtype.element_ty), mask=inside_C)
