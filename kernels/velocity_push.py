"""The velocity of one guidance branch to the partner that evaluates the other branch for the same rows.

Owns the copying; knows no barriers and no arithmetic. Who the partner is, is a word in device memory (chunk_words.py).
"""

import triton
import triton.language as tl
from torch import Tensor

from tetrion.kernels.chunk_words import is_live
from tetrion.kernels.group_table import slab_pointer

BLOCK = 2048
NUM_WARPS = 4


def velocity_push(
    velocity: Tensor, partners: Tensor, chunk: Tensor, status: Tensor, bases: Tensor, offset: int, *, device_id: int
) -> None:
    """Store `velocity`, [rows, width], contiguous, in the partner's velocity region.

    partners: this device and its partner, in either order: chunk_words.py's list. chunk, status, bases: as in
    qk_norm_rope_push. offset: of the velocity region in every slab, in bytes.
    """
    assert velocity.is_contiguous() and offset % 16 == 0, f"strides {velocity.stride()}, region at {offset}"
    if velocity.numel():
        _kernel[(triton.cdiv(velocity.numel(), BLOCK),)](
            velocity,
            partners,
            chunk,
            status,
            bases,
            device_id,
            offset // velocity.element_size(),
            velocity.numel(),
            SIZE=BLOCK,
            num_warps=NUM_WARPS,
        )


@triton.jit(do_not_specialize=["me"])
def _kernel(velocity, partners, chunk, status, bases, me, offset, count, SIZE: tl.constexpr):
    first, second = tl.load(partners), tl.load(partners + 1)
    partner = tl.where(first == me, second, first)
    element_B = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside_B = is_live(chunk, status) & (element_B < count)
    theirs = slab_pointer(bases, partner, velocity.dtype.element_ty) + offset
    tl.store(theirs + element_B, tl.load(velocity + element_B, mask=inside_B), mask=inside_B)
