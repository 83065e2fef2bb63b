"""Between two sub-blocks of a transformer: x + gate · y, then a norm without affine weights, · (1 + scale) + shift. The
norm is LayerNorm, or RMSNorm with an epsilon of its own.

Owns the arithmetic of `reference.residual_modulate` (adaptive layer norm: DiT, arXiv:2212.09748). One program a row,
sums in fp32 in one fixed order: row-exact. The sum is rounded to its dtype before it is normed, as if it had been read
back. One launch serves two streams (text and image) with vectors of their own.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from tetrion.kernels.reference import EPS, Branch
from tetrion.kernels.step_row import step_row


def residual_modulate(
    branches: Sequence[Branch], *, step: Tensor | None = None, rms_epsilon: float | None = None
) -> list[tuple[Tensor, Tensor]]:
    """(x + gate · y, that normed and modulated) of one or two branches of one width and dtype.

    step: int32 [1] on the device, for vectors of a table. rms_epsilon: of RMSNorm, in place of LayerNorm. The sum takes
    y's place; without y it is x itself. What is normed is a new tensor for both branches together, the first one's rows
    first.
    """
    assert 1 <= len(branches) <= 2, f"{len(branches)} branches"
    first, last = branches[0], branches[-1]
    rows, width = [len(branch.x) for branch in branches], first.x.shape[1]
    normed = first.x.new_empty(sum(rows), width)
    stride = _check(branches, width, step)
    if sum(rows):
        block = triton.next_power_of_2(width)
        _kernel[(sum(rows),)](
            *first,
            *last,
            normed,
            step,
            stride,
            *(0 if x is None else x.stride(0) for x in (first.x, first.y, last.x, last.y)),
            rows[0],
            WIDTH=width,
            BLOCK=block,
            EPSILON=EPS if rms_epsilon is None else rms_epsilon,
            IS_RMS=rms_epsilon is not None,
            num_warps=max(1, min(8, block // 512)),
        )
    sums = [branch.x if branch.y is None else branch.y for branch in branches]
    return list(zip(sums, normed.split(rows), strict=True))


def _check(branches: Sequence[Branch], width: int, step: Tensor | None) -> int:
    """The tables' row stride."""
    strides = set()
    for x, shift, scale, gate, y in branches:
        assert x.shape[1] == width and x.stride(1) == 1 and x.dtype == branches[0].x.dtype, f"{x.dtype} {x.shape}"
        assert (y is None) == (gate is None) == (branches[0].y is None), "both branches have something to add, or none"
        assert y is None or (y.shape == x.shape and y.stride(1) == 1 and y.dtype == x.dtype), f"{x.shape} and no such y"
        strides |= {step_row(vector, width, step)[1] for vector in (shift, scale, gate) if vector is not None}
    assert len(strides) == 1, f"vectors of tables with rows of {strides}"
    return strides.pop()


@triton.jit(do_not_specialize=["first_rows"])
def _kernel(
    first_x,
    first_shift,
    first_scale,
    first_gate,
    first_y,
    last_x,
    last_shift,
    last_scale,
    last_gate,
    last_y,
    normed,
    step,
    vector_stride,
    first_x_stride,
    first_y_stride,
    last_x_stride,
    last_y_stride,
    first_rows,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EPSILON: tl.constexpr,
    IS_RMS: tl.constexpr,
):
    program = tl.program_id(0)
    column_C = tl.arange(0, BLOCK)
    inside_C = column_C < WIDTH
    vector_C = column_C
    if step is not None:
        vector_C += tl.load(step) * vector_stride
    if program < first_rows:
        row = program.to(tl.int64)
        x_C = _sum(first_x, first_gate, first_y, row * first_x_stride, row * first_y_stride, vector_C, column_C, WIDTH)
        shift, scale = first_shift, first_scale
    else:
        row = (program - first_rows).to(tl.int64)
        x_C = _sum(last_x, last_gate, last_y, row * last_x_stride, row * last_y_stride, vector_C, column_C, WIDTH)
        shift, scale = last_shift, last_scale
    shift_C = tl.load(shift + vector_C, mask=inside_C, other=0.0).to(tl.float32)
    scale_C = tl.load(scale + vector_C, mask=inside_C, other=0.0).to(tl.float32)
    centred_C = x_C if IS_RMS else tl.where(inside_C, x_C - tl.sum(x_C, 0) / WIDTH, 0.0)
    normed_C = centred_C * tl.rsqrt(tl.sum(centred_C * centred_C, 0) / WIDTH + EPSILON)
    result_C = normed_C * (1 + scale_C) + shift_C
    out = normed + program.to(tl.int64) * WIDTH
    tl.store(out + column_C, result_C.to(normed.dtype.element_ty), mask=inside_C)


@triton.jit
def _sum(x, gate, y, x_row, y_row, vector_C, column_C, WIDTH: tl.constexpr):
    """x + gate · y of a row, stored in y's place; fp32 of the rounded value, 0 beyond the row."""
    inside_C = column_C < WIDTH
    x_C = tl.load(x + x_row + column_C, mask=inside_C, other=0.0).to(tl.float32)
    if y is not None:
        y_C = tl.load(y + y_row + column_C, mask=inside_C, other=0.0).to(tl.float32)
        gate_C = tl.load(gate + vector_C, mask=inside_C, other=0.0).to(tl.float32)
        rounded_C = (x_C + gate_C * y_C).to(y.dtype.element_ty)
        tl.store(y + y_row + column_C, rounded_C, mask=inside_C)
        x_C = rounded_C.to(tl.float32)
    return x_C
