"""What each member of a sequence-parallel group holds, as words in device memory.

Owns the order of the words; knows no pointers and no tensors but its own. A table is of one sequence, one degree and
one number of heads, and the same for any members: who they are is in the chunk's words (chunk_words.py). A sequence has
up to MAX_SEGMENTS segments in canonical order; those that it lacks have no rows.

int32 words of a group of degree G; `starts[i]` is where member i's range begins, `starts[G]` where the last one ends:

    s (G + 1)               starts of segment s  [G + 1]  row numbers in the segment
    MAX_SEGMENTS (G + 1)    head starts          [G + 1]
"""

from collections.abc import Sequence
from itertools import pairwise

import triton
import triton.language as tl

MAX_SEGMENTS: tl.constexpr = tl.constexpr(3)


def num_words(degree: int) -> int:
    return (MAX_SEGMENTS.value + 1) * (degree + 1)


def group_words(segments: Sequence[Sequence[range]], heads: Sequence[range]) -> list[int]:
    """The table's words. Each of `segments`, and `heads`: each member's range, by rank; consecutive and from 0."""
    degree, absent = len(heads), MAX_SEGMENTS.value - len(segments)
    assert degree and absent >= 0, f"{len(segments)} segments, {degree} members"
    lists = [*segments, *[[range(0)] * degree] * absent, heads]
    return [start for ranges in lists for start in _starts(ranges, degree)]


def _starts(ranges: Sequence[range], degree: int) -> list[int]:
    consecutive = all(left.stop == right.start for left, right in pairwise(ranges))
    assert len(ranges) == degree and consecutive and ranges[0].start == 0, f"{ranges} do not split a whole by {degree}"
    return [0, *(part.stop for part in ranges)]


@triton.jit
def segment_range(table, segment, rank, DEGREE: tl.constexpr):
    """First row of a segment that a rank holds, and one past its last."""
    starts = table + segment * (DEGREE + 1) + rank
    return tl.load(starts), tl.load(starts + 1)


@triton.jit
def segment_count(table, segment, DEGREE: tl.constexpr):
    """Rows of a segment, of all ranks."""
    return tl.load(table + segment * (DEGREE + 1) + DEGREE)


@triton.jit
def rows_before(table, SEGMENT: tl.constexpr, DEGREE: tl.constexpr):
    """Canonical row at which a segment begins in the whole sequence."""
    row = 0
    for earlier in tl.static_range(SEGMENT):
        row += segment_count(table, earlier, DEGREE)
    return row


@triton.jit
def head_range(table, rank, DEGREE: tl.constexpr):
    return segment_range(table, MAX_SEGMENTS, rank, DEGREE)


@triton.jit
def slab_pointer(bases, device, dtype: tl.constexpr):
    """The device's slab as a pointer to `dtype`. Slabs are page-aligned; wide stores need the hint."""
    address = tl.multiple_of(tl.load(bases + device), 16)
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)
