"""Between two sub-blocks that are normed before and behind: x + gate · RMSNorm(y), then RMSNorm of that · scale.

Owns the arithmetic of `Ops.residual_rms` (sandwich norm: arXiv:2105.13290; RMSNorm: arXiv:1910.07467), whose norms'
weights are part of gate and scale. One program a row, sums in fp32 in one fixed order: row-exact. The sum is rounded to
its dtype before it is normed, as if it had been read back.
"""

import triton
import triton.language as tl
from torch import Tensor

from tetrion.kernels.step_row import step_row


def residual_rms(
    x: Tensor,
    scale: Tensor,
    gate: Tensor | None = None,
    y: Tensor | None = None,
    *,
    epsilon: float,
    step: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(x + gate · RMSNorm(y), RMSNorm of that · scale), each [n, C]; without y the sum is x itself.

    step: int32 [1] on the device, for vectors of a table. The sum takes y's place; what is normed is a new tensor.
    """
    normed = x.new_empty(x.shape)
    _launch(x, scale, gate, y, normed, epsilon, step)
    return x if y is None else y, normed


def gated_rms_sum(x: Tensor, gate: Tensor, y: Tensor, *, epsilon: float, step: Tensor | None = None) -> Tensor:
    """x + gate · RMSNorm(y), in y's place."""
    _launch(x, None, gate, y, None, epsilon, step)
    return y


def _launch(
    x: Tensor,
    scale: Tensor | None,
    gate: Tensor | None,
    y: Tensor | None,
    normed: Tensor | None,
    epsilon: float,
    step: Tensor | None,
) -> None:
    rows, width = x.shape
    assert x.stride(1) == 1 and (y is None) == (gate is None), f"x of strides {x.stride()}, y without gate"
    assert y is None or (y.shape == x.shape and y.stride(1) == 1 and y.dtype == x.dtype), f"{x.shape} and no such y"
    strides = {step_row(vector, width, step)[1] for vector in (scale, gate) if vector is not None}
    assert len(strides) == 1, f"vectors of tables with rows of {strides}"
    if not rows:
        return
    block = triton.next_power_of_2(width)
    _kernel[(rows,)](
        x,
        scale,
        gate,
        y,
        normed,
        step,
        strides.pop(),
        x.stride(0),
        0 if y is None else y.stride(0),
        WIDTH=width,
        BLOCK=block,
        EPSILON=epsilon,
        num_warps=max(1, min(8, block // 512)),
    )


@triton.jit
def _kernel(
    x,
    scale,
    gate,
    y,
    normed,
    step,
    vector_stride,
    x_stride,
    y_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EPSILON: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column_C = tl.arange(0, BLOCK)
    inside_C = column_C < WIDTH
    vector_C = column_C
    if step is not None:
        vector_C += tl.load(step) * vector_stride
    x_C = tl.load(x + row * x_stride + column_C, mask=inside_C, other=0.0).to(tl.float32)
    if y is not None:
        y_C = tl.load(y + row * y_stride + column_C, mask=inside_C, other=0.0).to(tl.float32)
        gate_C = tl.load(gate + vector_C, mask=inside_C, other=0.0).to(tl.float32)
        rounded_C = (x_C + gate_C * _rms(y_C, WIDTH, EPSILON)).to(y.dtype.element_ty)
        tl.store(y + row * y_stride + column_C, rounded_C, mask=inside_C)
        x_C = rounded_C.to(tl.float32)
    if normed is not None:
        scale_C = tl.load(scale + vector_C, mask=inside_C, other=0.0).to(tl.float32)
        result_C = _rms(x_C, WIDTH, EPSILON) * scale_C
        tl.store(normed + row * WIDTH + column_C, result_C.to(normed.dtype.element_ty), mask=inside_C)


@triton.jit
def _rms(x_C, WIDTH: tl.constexpr, EPSILON: tl.constexpr):
    """0 beyond the row, as x is."""
    return x_C * tl.rsqrt(tl.sum(x_C * x_C, 0) / WIDTH + EPSILON)
