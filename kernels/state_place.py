"""Where the state that steps change lies in slots, and which of its rows are whose.

The state of a request is fp32 [all rows of the stepped segment, width] (K rows of channels side by side, if a solver
has K), and a slot has several buffers for it. A member's rows are consecutive, so they are one contiguous piece. Slot,
buffers and rows are words (chunk_words.py).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tetrion.kernels.chunk_words import own_rows, slot_of
from tetrion.kernels.group_table import slab_pointer

BLOCK = 1024
NUM_WARPS = 4
ITEMSIZE = 4


class Place(NamedTuple):
    """The first buffer of slot 0 begins at `offset` of every slab, in bytes; from one slot to the next it is
    `slot_bytes`, from one buffer to the next `buffer_bytes`."""

    offset: int
    slot_bytes: int
    buffer_bytes: int

    def in_elements(self, rows: Tensor) -> tuple[int, int, int]:
        """All three, once it is checked that they fit `rows`."""
        assert rows.dtype == torch.float32 and rows.is_contiguous(), f"state rows are {rows.dtype}"
        assert all(num_bytes % 16 == 0 for num_bytes in self), f"{self} is not aligned"
        return self.offset // ITEMSIZE, self.slot_bytes // ITEMSIZE, self.buffer_bytes // ITEMSIZE


@triton.jit
def own_piece(chunk, bases, device, buffer, offset, slot_size, buffer_size, WIDTH: tl.constexpr):
    """Pointer to this member's rows in a buffer of the slot on `device`, and how many elements they have."""
    start, stop = own_rows(chunk)
    place = tl.multiple_of(slot_of(chunk) * slot_size + buffer * buffer_size + offset, 4)
    return slab_pointer(bases, device, tl.float32) + place + start * WIDTH, (stop - start) * WIDTH
