"""The tail of a step: guidance branches put together, then a linear solver's step, with tables read in device memory.

Owns the arithmetic of `reference.guided_step`: in fp32, every product added by one fused multiply-add, in the order of
the table. Elementwise but for the K rows of a token's state, hence row-exact. Euler's method (arXiv:2403.03206) is
K = 1 with coefficients 1 and the change of the noise level.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
NUM_WARPS = 4


def guided_step(
    state: Tensor,
    velocities: Sequence[Tensor],
    coefficients: Tensor,
    guidance: Tensor,
    step: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The state after the step that the counter tells: fp32 [n, K · C], by default a new tensor; `out` may be `state`.

    state: fp32 [n, K · C], K rows of C side by side. velocities: [n, C] each, of one float type: of the prompt and,
    with guidance, of the negative prompt: v₁ + guidance[step] · (v₀ − v₁). All contiguous. coefficients: fp32
    [steps, K, K + 1], of each new row: the old rows', then the velocity's. guidance: fp32 [steps]. step: int32 [1].
    """
    out = torch.empty_like(state) if out is None else out
    _check(state, velocities, coefficients, guidance, step, out)
    count = velocities[0].numel()
    if count:
        _kernel[(triton.cdiv(count, BLOCK),)](
            state,
            velocities[0],
            velocities[1] if len(velocities) == 2 else None,
            coefficients,
            guidance,
            step,
            out,
            count,
            NUM_ROWS=coefficients.shape[1],
            CHANNELS=velocities[0].shape[1],
            SIZE=BLOCK,
            num_warps=NUM_WARPS,
        )
    return out


def _check(
    state: Tensor, velocities: Sequence[Tensor], coefficients: Tensor, guidance: Tensor, step: Tensor, out: Tensor
) -> None:
    velocity, num_rows = velocities[0], coefficients.shape[1]
    assert len(velocities) <= 2 and all(v.shape == velocity.shape for v in velocities), f"{len(velocities)} velocities"
    assert state.shape == (len(velocity), num_rows * velocity.shape[1]), f"{state.shape} and {velocity.shape}"
    assert out.shape == state.shape and state.dtype == out.dtype == torch.float32, f"{state.dtype} to {out.shape}"
    assert all(x.is_contiguous() for x in (state, out, *velocities, coefficients)), "tensors must be contiguous"
    assert coefficients.shape[2] == num_rows + 1, f"coefficients {tuple(coefficients.shape)}"
    assert coefficients.dtype == guidance.dtype == torch.float32 and step.dtype == torch.int32, "tables' types"


@triton.jit
def _kernel(
    state,
    velocity,
    negative,
    coefficients,
    guidance,
    step,
    out,
    count,
    NUM_ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
):
    index_B = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside_B = index_B < count
    row_B = index_B // CHANNELS
    index_in_state_B = index_B + row_B * ((NUM_ROWS - 1) * CHANNELS)
    now = tl.load(step)
    velocity_B = tl.load(velocity + index_B, mask=inside_B).to(tl.float32)
    if negative is not None:
        negative_B = tl.load(negative + index_B, mask=inside_B).to(tl.float32)
        factor_B = tl.load(guidance + now) + tl.zeros_like(negative_B)
        velocity_B = tl.fma(factor_B, velocity_B - negative_B, negative_B)
    old = ()
    for row in tl.static_range(NUM_ROWS):
        old = old + (tl.load(state + index_in_state_B + row * CHANNELS, mask=inside_B),)  # type: ignore  # noqa: RUF005
    weights = coefficients + now * (NUM_ROWS * (NUM_ROWS + 1))
    for new in tl.static_range(NUM_ROWS):
        total_B = tl.load(weights + new * (NUM_ROWS + 1)) * old[0]  # type: ignore[misc]
        for row in tl.static_range(1, NUM_ROWS):
            weight_B = tl.load(weights + new * (NUM_ROWS + 1) + row) + tl.zeros_like(total_B)
            total_B = tl.fma(weight_B, old[row], total_B)
        weight_B = tl.load(weights + new * (NUM_ROWS + 1) + NUM_ROWS) + tl.zeros_like(total_B)
        total_B = tl.fma(weight_B, velocity_B, total_B)
        tl.store(out + index_in_state_B + new * CHANNELS, total_B, mask=inside_B)
