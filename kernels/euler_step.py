"""One Euler step of flow-matching sampling (arXiv:2403.03206), with the step's size read from device memory.

Owns the arithmetic of `sampling.flow_match.euler_step`: in fp32. Elementwise, hence row-exact.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
NUM_WARPS = 4


def euler_step(latents: Tensor, velocity: Tensor, deltas: Tensor, step: Tensor) -> Tensor:
    """latents + deltas[step] · velocity, a new fp32 tensor.

    latents: fp32 [n, C]; velocity: [n, C], any float; both contiguous. deltas: fp32 [steps], each step's change of the
    noise level; step: int32 [1]; both on the device.
    """
    assert latents.shape == velocity.shape, f"{tuple(latents.shape)} and {tuple(velocity.shape)}"
    assert latents.is_contiguous() and velocity.is_contiguous(), "latents and velocity must be contiguous"
    out = latents.new_empty(latents.shape)
    count = latents.numel()
    if count:
        _kernel[(triton.cdiv(count, BLOCK),)](
            latents, velocity, deltas, step, out, count, COLUMNS=BLOCK, num_warps=NUM_WARPS
        )
    return out


@triton.jit
def _kernel(latents, velocity, deltas, step, out, count, COLUMNS: tl.constexpr):
    index = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = index < count
    delta = tl.load(deltas + tl.load(step))
    old = tl.load(latents + index, mask=inside)
    change = tl.load(velocity + index, mask=inside).to(tl.float32)
    tl.store(out + index, old + delta * change, mask=inside)
