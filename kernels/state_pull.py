"""A newcomer's copy of a request's state: prompt embeddings, pooled embedding, latents, from a peer's slot to its own.

Owns the copying; knows no versions: who waits for the state, and who checks it afterwards, is slot_version.py. Source
and slot are words in device memory (chunk_words.py). Nothing is copied from oneself, nor if the words want no version.
"""

import triton
import triton.language as tl
from torch import Tensor

from tetrion.kernels.chunk_words import slot_of, source_of, start_version
from tetrion.kernels.group_table import device_of, own_rank, slab_pointer

UNIT_BYTES = 16
BLOCK_UNITS = 512
NUM_WARPS = 4

Piece = tuple[int, int]
"""Where it begins in a slot, and how long it is, in bytes. It begins at a multiple of UNIT_BYTES; up to UNIT_BYTES - 1
bytes behind it are copied too."""


def state_pull(
    table: Tensor,
    chunk: Tensor,
    bases: Tensor,
    status: Tensor,
    pieces: tuple[Piece, Piece, Piece],
    *,
    slots_offset: int,
    slot_bytes: int,
) -> None:
    """Enqueue the copy. table, chunk, bases, status: as in slot_version.py; slots_offset, slot_bytes: of a slab."""
    starts, sizes = zip(*pieces, strict=True)
    assert all(offset % UNIT_BYTES == 0 for offset in (*starts, slots_offset, slot_bytes)), f"{pieces} not aligned"
    units = [triton.cdiv(size, UNIT_BYTES) for size in sizes]
    blocks = [triton.cdiv(count, BLOCK_UNITS) for count in units]
    _kernel[(max(sum(blocks), 1),)](
        table,
        chunk,
        bases,
        status,
        slots_offset // UNIT_BYTES,
        slot_bytes // UNIT_BYTES,
        *(start // UNIT_BYTES for start in starts),
        *units,
        blocks[0],
        blocks[0] + blocks[1],
        SHORTS=UNIT_BYTES // 2,
        BLOCK=BLOCK_UNITS * (UNIT_BYTES // 2),
        num_warps=NUM_WARPS,
    )


SIZES = ["slots", "slot_units", "start_0", "start_1", "start_2", "units_0", "units_1", "units_2", "first_1", "first_2"]


@triton.jit(do_not_specialize=SIZES)
def _kernel(
    table,
    chunk,
    bases,
    status,
    slots,
    slot_units,
    start_0,
    start_1,
    start_2,
    units_0,
    units_1,
    units_2,
    first_1,
    first_2,
    SHORTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All sizes in units of SHORTS 16-bit elements; `first_i`: the program at which piece i begins."""
    source = source_of(chunk)
    me = device_of(table, own_rank(table))
    if (source != me) & (start_version(chunk) != 0) & (tl.load(status) == 0):
        program = tl.program_id(0)
        block, start, units = program, start_0, units_0
        if program >= first_2:
            block, start, units = program - first_2, start_2, units_2
        elif program >= first_1:
            block, start, units = program - first_1, start_1, units_1
        element_B = block * BLOCK + tl.arange(0, BLOCK)
        inside_B = element_B < units * SHORTS
        offset = (slots.to(tl.int64) + slot_of(chunk) * slot_units + start) * SHORTS
        value_B = tl.load(slab_pointer(bases, source, tl.int16) + offset + element_B, mask=inside_B)
        tl.store(slab_pointer(bases, me, tl.int16) + offset + element_B, value_B, mask=inside_B)
