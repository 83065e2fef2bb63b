"""Who is in a sequence-parallel group and what each member holds, as words in device memory.

Owns the order of the words; knows no pointers and no tensors but its own. Kernels read the table when they run, so one
CUDA graph serves any members of a degree, and either member of an uneven split: refresh the words before the replay.

int32 words of a group of degree G; `starts[i]` is where member i's range begins, `starts[G]` where the last one ends:

    0            rank of the device that holds this table
    1            members       [G]      device ids by rank
    1 + G        text starts   [G + 1]  token numbers in the text stream
    2 + 2G       image starts  [G + 1]  token numbers in the image stream
    3 + 3G       head starts   [G + 1]
"""

from collections.abc import Sequence
from itertools import pairwise

import triton
import triton.language as tl


def num_words(degree: int) -> int:
    return 4 * degree + 4


def group_words(
    rank: int, members: Sequence[int], text: Sequence[range], image: Sequence[range], heads: Sequence[range]
) -> list[int]:
    """The table's words. `text`, `image`, `heads`: each member's range, by rank; consecutive and from 0."""
    degree = len(members)
    assert 0 <= rank < degree, f"rank {rank} in a group of {degree}"
    return [rank, *members, *(start for ranges in (text, image, heads) for start in _starts(ranges, degree))]


def _starts(ranges: Sequence[range], degree: int) -> list[int]:
    consecutive = all(left.stop == right.start for left, right in pairwise(ranges))
    assert len(ranges) == degree and consecutive and ranges[0].start == 0, f"{ranges} do not split a whole by {degree}"
    return [0, *(part.stop for part in ranges)]


@triton.jit
def own_rank(table):
    return tl.load(table)


@triton.jit
def device_of(table, rank):
    return tl.load(table + 1 + rank)


@triton.jit
def text_range(table, rank, DEGREE: tl.constexpr):
    """First text token of a rank, and one past its last."""
    starts = table + 1 + DEGREE + rank
    return tl.load(starts), tl.load(starts + 1)


@triton.jit
def image_range(table, rank, DEGREE: tl.constexpr):
    starts = table + 2 + 2 * DEGREE + rank
    return tl.load(starts), tl.load(starts + 1)


@triton.jit
def head_range(table, rank, DEGREE: tl.constexpr):
    starts = table + 3 + 3 * DEGREE + rank
    return tl.load(starts), tl.load(starts + 1)


@triton.jit
def num_text_tokens(table, DEGREE: tl.constexpr):
    return tl.load(table + 1 + 2 * DEGREE)


@triton.jit
def disarm(table, DEGREE: tl.constexpr):
    """Leave nobody any token: whatever reads the table from now on stores nothing anywhere."""
    for word in tl.static_range(1 + DEGREE, 3 + 3 * DEGREE):
        tl.store(table + word, 0)


@triton.jit
def slab_pointer(bases, device, dtype: tl.constexpr):
    """The device's slab as a pointer to `dtype`. Slabs are page-aligned; wide stores need the hint."""
    address = tl.multiple_of(tl.load(bases + device), 16)
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)
