"""What one chunk of steps is about, as words in device memory behind the group's table (group_table.py).

Owns the order of the words; knows no slabs and no groups. Kernels read them when they run, so a CUDA graph and the
small kernels around it serve any slot and any state. int32 words:

    0       slot that holds the request's state
    1       device to pull the state from
    2, 3    version that the state must have at the start, low and high half
    4, 5    version that the slot gets at the end

Versions: see `slot_version` in engine/parallel/words.py. 0 at the start: nothing is waited for or pulled. 0 at the end:
the slot's version stays as it is. So words of zeros harm nobody.
"""

import triton
import triton.language as tl

NUM_CHUNK_WORDS = 6
HALF_RANGE = 1 << 32


def chunk_words(slot: int, source: int, start_version: int, end_version: int) -> list[int]:
    return [slot, source, *_halves(start_version), *_halves(end_version)]


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
def _joined(halves):
    low = tl.load(halves).to(tl.int64) & 0xFFFFFFFF
    return (tl.load(halves + 1).to(tl.int64) << 32) | low
