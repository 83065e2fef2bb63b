"""A newcomer's copy of a request's state from a peer's slot to its own, piece by piece.

Owns the copying; knows no versions: who waits for the state, and who checks it afterwards, is slot_version.py. Source
and slot are words in device memory (chunk_words.py). Nothing is copied from oneself, nor if the words want no version.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from tetrion.kernels.chunk_words import slot_of, source_of, start_version
from tetrion.kernels.group_table import slab_pointer

UNIT_BYTES = 16
BLOCK_UNITS = 512
NUM_WARPS = 4


def state_pull(
    pieces: Sequence[tuple[int, int]],
    chunk: Tensor,
    status: Tensor,
    bases: Tensor,
    *,
    device_id: int,
    slots_offset: int,
    slot_bytes: int,
) -> None:
    """Enqueue the copies. chunk, status, bases, device_id: as in slot_version.py; slots_offset, slot_bytes: of a slab.

    pieces: where each begins in a slot, and how long it is, in bytes. It begins at a multiple of UNIT_BYTES; up to
        UNIT_BYTES - 1 bytes behind it are copied too.
    """
    for start, num_bytes in pieces:
        assert all(at % UNIT_BYTES == 0 for at in (start, slots_offset, slot_bytes)), f"{pieces} are not aligned"
        if num_bytes:
            units = triton.cdiv(num_bytes, UNIT_BYTES)
            _kernel[(triton.cdiv(units, BLOCK_UNITS),)](
                chunk,
                status,
                bases,
                device_id,
                (slots_offset + start) // UNIT_BYTES,
                slot_bytes // UNIT_BYTES,
                units,
                SHORTS=UNIT_BYTES // 2,
                BLOCK=BLOCK_UNITS * (UNIT_BYTES // 2),
                num_warps=NUM_WARPS,
            )


@triton.jit(do_not_specialize=["me", "start", "slot_units", "units"])
def _kernel(chunk, status, bases, me, start, slot_units, units, SHORTS: tl.constexpr, BLOCK: tl.constexpr):
    """All sizes in units of SHORTS 16-bit elements; `start`: of the piece in slot 0."""
    source = source_of(chunk)
    if (source != me) & (start_version(chunk) != 0) & (tl.load(status) == 0):
        element_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside_B = element_B < units * SHORTS
        offset = (start.to(tl.int64) + slot_of(chunk) * slot_units) * SHORTS
        value_B = tl.load(slab_pointer(bases, source, tl.int16) + offset + element_B, mask=inside_B)
        tl.store(slab_pointer(bases, me, tl.int16) + offset + element_B, value_B, mask=inside_B)
