"""What one chunk of steps is about and who takes part in it, as words in device memory.

Owns the order of the words; knows no slabs and no ranges of others. Kernels read them when they run, so a CUDA graph
and the small kernels around it serve any slot, any state and any members. int32 words; lists of devices are `lanes`
long, a power of two, and filled up with the device that holds the words:

    0               slot that holds the request's state
    1               device to pull the state from
    2, 3            version that the state must have at the start, low and high half
    4, 5            version that the state gets at the end
    6               1: of a chunk; 0: of a rehearsal, in which nothing is stored
    7               rank of this device in its part of the group
    8, 9            this device's rows of the state: the first, and one past the last
    10, 11          buffer of the slot that has the state at the start, and that gets it at the end
    12              members of its part by rank               [lanes]
    12 + lanes      all members of the group                  [lanes]
    12 + 2 lanes    this device and its partner, by branch    [lanes]

Versions: see `slot_version` in engine/parallel/words.py. 0 at the start: nothing is waited for or pulled. 0 at the end:
no version changes. So words of a rehearsal harm nobody.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

HALF_RANGE = 1 << 32
HEADER_WORDS = 12
NUM_LISTS = 3
MIN_LANES = 4
FIRST_MEMBER: tl.constexpr = tl.constexpr(HEADER_WORDS)


def lanes_for(num_devices: int) -> int:
    """How long lists of devices are, for any group of so many."""
    return max(MIN_LANES, triton.next_power_of_2(num_devices))


def num_words(lanes: int) -> int:
    return HEADER_WORDS + NUM_LISTS * lanes


def lists_of(words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the lists: members of the part, all members, partners."""
    part, everyone, partners = words[HEADER_WORDS:].view(NUM_LISTS, -1).unbind()
    return part, everyone, partners


def chunk_words(
    me: int,
    lanes: int,
    *,
    slot: int,
    source: int,
    start_version: int,
    end_version: int,
    start_buffer: int,
    end_buffer: int,
    part: Sequence[int],
    rows: range,
    everyone: Sequence[int],
    partners: Sequence[int],
) -> list[int]:
    """Of a chunk on device `me`. rows: its own of the state."""
    state = [slot, source, *_halves(start_version), *_halves(end_version)]
    lists = [device for devices in (part, everyone, partners) for device in _filled(devices, me, lanes)]
    return [*state, 1, part.index(me), rows.start, rows.stop, start_buffer, end_buffer, *lists]


def rehearsal_words(me: int, lanes: int) -> list[int]:
    return [0, me, *[0] * (HEADER_WORDS - 2), *[me] * (NUM_LISTS * lanes)]


def publishing_words(me: int, lanes: int, slot: int, buffer: int, version: int) -> list[int]:
    """Of a chunk without steps on `me` alone, after which a buffer of the slot has `version`."""
    alone, nothing = (me,), range(0)
    return chunk_words(
        me,
        lanes,
        slot=slot,
        source=me,
        start_version=0,
        end_version=version,
        start_buffer=buffer,
        end_buffer=buffer,
        part=alone,
        rows=nothing,
        everyone=alone,
        partners=alone,
    )


def _filled(devices: Sequence[int], me: int, lanes: int) -> list[int]:
    assert me in devices and len(devices) <= lanes, f"device {me} in {tuple(devices)}, {lanes} at most"
    return [*devices, *[me] * (lanes - len(devices))]


def _halves(version: int) -> tuple[int, int]:
    """Low and high 32 bits, as signed numbers."""
    assert 0 <= version < HALF_RANGE**2, f"version {version:#x}"
    low, high = version % HALF_RANGE, version // HALF_RANGE
    return low - HALF_RANGE * (low >= HALF_RANGE // 2), high - HALF_RANGE * (high >= HALF_RANGE // 2)


@triton.jit
def slot_of(chunk):
    return tl.load(chunk).to(tl.int64)


@triton.jit
def source_of(chunk):
    return tl.load(chunk + 1)


@triton.jit
def start_version(chunk):
    return _joined(chunk + 2)


@triton.jit
def end_version(chunk):
    return _joined(chunk + 4)


@triton.jit
def start_buffer(chunk):
    return tl.load(chunk + 10).to(tl.int64)


@triton.jit
def end_buffer(chunk):
    return tl.load(chunk + 11).to(tl.int64)


@triton.jit
def is_live(chunk, status):
    """Whether kernels may store what others see: in a chunk, as long as nothing went wrong (see slot_version.py)."""
    return (tl.load(chunk + 6) != 0) & ((tl.load(status) | tl.load(status + 1)) == 0)


@triton.jit
def own_rank(chunk):
    return tl.load(chunk + 7)


@triton.jit
def own_rows(chunk):
    """This device's rows of the state: the first, and one past the last."""
    return tl.load(chunk + 8), tl.load(chunk + 9)


@triton.jit
def member_of(chunk, rank):
    """The device of a rank in this device's part."""
    return tl.load(chunk + FIRST_MEMBER + rank)


@triton.jit
def _joined(halves):
    low = tl.load(halves).to(tl.int64) & 0xFFFFFFFF
    return (tl.load(halves + 1).to(tl.int64) << 32) | low
