"""This member's rows of a request's state, after a chunk of steps, into the end buffers of its part of the group.

Owns the copying; knows no barriers and no arithmetic. See state_place.py for what a state is.
"""

import triton
import triton.language as tl
from torch import Tensor

from tetrion.kernels.chunk_words import end_buffer, is_live, member_of, own_rank
from tetrion.kernels.state_place import BLOCK, NUM_WARPS, Place, own_piece


def state_push(rows: Tensor, chunk: Tensor, status: Tensor, bases: Tensor, place: Place, *, degree: int) -> None:
    """Store this member's rows, the first of `rows`, fp32 [most rows of a member, width], in every member's end buffer.

    chunk: see chunk_words.py; its part has `degree` members. status, bases: as in qk_norm_rope_push.
    """
    offset, slot_size, buffer_size = place.in_elements(rows)
    if rows.numel():
        _kernel[(degree * triton.cdiv(rows.numel(), BLOCK),)](
            rows,
            chunk,
            status,
            bases,
            offset,
            slot_size,
            buffer_size,
            degree,
            WIDTH=rows.shape[1],
            SIZE=BLOCK,
            num_warps=NUM_WARPS,
        )


@triton.jit(do_not_specialize=["offset", "slot_size", "buffer_size", "degree"])
def _kernel(
    rows, chunk, status, bases, offset, slot_size, buffer_size, degree, WIDTH: tl.constexpr, SIZE: tl.constexpr
):
    program = tl.program_id(0)
    peer = (own_rank(chunk) + program % degree) % degree
    member, buffer = member_of(chunk, peer), end_buffer(chunk)
    theirs, count = own_piece(chunk, bases, member, buffer, offset, slot_size, buffer_size, WIDTH)
    element_B = program // degree * SIZE + tl.arange(0, SIZE)
    inside_B = is_live(chunk, status) & (element_B < count)
    tl.store(theirs + element_B, tl.load(rows + element_B, mask=inside_B), mask=inside_B)
