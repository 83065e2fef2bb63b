"""A step's latents: this member's rows out of its slot before the step, into every member's slot after it.

Owns the copying; knows no barriers and no arithmetic. Members and slot are words in device memory (group_table.py,
chunk_words.py), so a CUDA graph serves any of them. A member's rows of the latents [all image tokens, C] are
consecutive: every program copies one contiguous piece. Latents are fp32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tetrion.kernels.chunk_words import slot_of
from tetrion.kernels.group_table import device_of, image_range, num_words, own_rank, slab_pointer

BLOCK = 1024
NUM_WARPS = 4
ITEMSIZE = 4


class Place(NamedTuple):
    """Slot 0's latents begin at `offset` of every slab, in bytes; from one slot to the next it is `slot_bytes`."""

    offset: int
    slot_bytes: int
    degree: int


def latents_read(out: Tensor, table: Tensor, chunk: Tensor, bases: Tensor, place: Place) -> None:
    """Copy this member's rows from its own slot to the first rows of `out` [most rows of a member, C]; others get 0.

    table, bases: as in qk_norm_rope_push. chunk: see chunk_words.py.
    """
    _check(out, table, place)
    _read[(triton.cdiv(out.numel(), BLOCK),)](
        out,
        table,
        chunk,
        bases,
        place.offset // ITEMSIZE,
        place.slot_bytes // ITEMSIZE,
        out.shape[0],
        DEGREE=place.degree,
        CHANNELS=out.shape[1],
        SIZE=BLOCK,
        num_warps=NUM_WARPS,
    )


def latents_push(latents: Tensor, table: Tensor, chunk: Tensor, bases: Tensor, place: Place) -> None:
    """Store this member's new latents, the first rows of `latents`, in every member's slot. Arguments: latents_read."""
    _check(latents, table, place)
    _push[(place.degree * triton.cdiv(latents.numel(), BLOCK),)](
        latents,
        table,
        chunk,
        bases,
        place.offset // ITEMSIZE,
        place.slot_bytes // ITEMSIZE,
        DEGREE=place.degree,
        CHANNELS=latents.shape[1],
        SIZE=BLOCK,
        num_warps=NUM_WARPS,
    )


def _check(latents: Tensor, table: Tensor, place: Place) -> None:
    offset, slot_bytes, degree = place
    assert latents.dtype == torch.float32 and latents.is_contiguous(), f"latents are {latents.dtype}"
    assert table.dtype == torch.int32 and len(table) >= num_words(degree), f"{len(table)} words for degree {degree}"
    assert offset % 16 == 0 and slot_bytes % 16 == 0, f"latents at {offset} + slot · {slot_bytes} are not aligned"


@triton.jit
def _rows(table, chunk, bases, device, offset, slot_size, DEGREE: tl.constexpr, CHANNELS: tl.constexpr):
    """Pointer to this member's rows in the slot on `device`, and how many elements they have."""
    start, stop = image_range(table, own_rank(table), DEGREE)
    slot = tl.multiple_of(slot_of(chunk) * slot_size + offset, 4)
    return slab_pointer(bases, device, tl.float32) + slot + start * CHANNELS, (stop - start) * CHANNELS


@triton.jit(do_not_specialize=["offset", "slot_size", "most_rows"])
def _read(
    out,
    table,
    chunk,
    bases,
    offset,
    slot_size,
    most_rows,
    DEGREE: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
):
    me = device_of(table, own_rank(table))
    rows, count = _rows(table, chunk, bases, me, offset, slot_size, DEGREE, CHANNELS)
    element_B = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value_B = tl.load(rows + element_B, mask=element_B < count, other=0.0)
    tl.store(out + element_B, value_B, mask=element_B < most_rows * CHANNELS)


@triton.jit(do_not_specialize=["offset", "slot_size"])
def _push(
    latents,
    table,
    chunk,
    bases,
    offset,
    slot_size,
    DEGREE: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
):
    program = tl.program_id(0)
    peer = (own_rank(table) + program % DEGREE) % DEGREE
    rows, count = _rows(table, chunk, bases, device_of(table, peer), offset, slot_size, DEGREE, CHANNELS)
    element_B = program // DEGREE * SIZE + tl.arange(0, SIZE)
    inside_B = element_B < count
    tl.store(rows + element_B, tl.load(latents + element_B, mask=inside_B), mask=inside_B)
