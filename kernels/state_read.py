"""This member's rows of a request's state, out of its own start buffer.

Owns the copying; knows no barriers and no arithmetic. See state_place.py for what a state is.
"""

import triton
import triton.language as tl
from torch import Tensor

from tetrion.kernels.chunk_words import start_buffer
from tetrion.kernels.state_place import BLOCK, NUM_WARPS, Place, own_piece


def state_read(out: Tensor, chunk: Tensor, bases: Tensor, place: Place, *, device_id: int) -> None:
    """Copy this member's rows to the first rows of `out`, fp32 [most rows of a member, width]; others get 0.

    chunk: see chunk_words.py. bases: as in qk_norm_rope_push.
    """
    offset, slot_size, buffer_size = place.in_elements(out)
    if out.numel():
        _kernel[(triton.cdiv(out.numel(), BLOCK),)](
            out,
            chunk,
            bases,
            device_id,
            offset,
            slot_size,
            buffer_size,
            out.shape[0],
            WIDTH=out.shape[1],
            SIZE=BLOCK,
            num_warps=NUM_WARPS,
        )


@triton.jit(do_not_specialize=["me", "offset", "slot_size", "buffer_size", "most_rows"])
def _kernel(out, chunk, bases, me, offset, slot_size, buffer_size, most_rows, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    rows, count = own_piece(chunk, bases, me, start_buffer(chunk), offset, slot_size, buffer_size, WIDTH)
    element_B = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value_B = tl.load(rows + element_B, mask=element_B < count, other=0.0)
    tl.store(out + element_B, value_B, mask=element_B < most_rows * WIDTH)
