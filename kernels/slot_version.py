"""Slot versions on GPUs: who may read a request's state, and when (engine/parallel/words.py says what a version is).

Owns waiting for a version, bounded and abortable, and writing one; knows no tensors of the model. All kernels are one
program, read the chunk's words (chunk_words.py) and work on `status`, two int32 words of this device:

    0   not 0: counters or states of this device cannot be trusted any more; every kernel of the exchange returns at
        once until the device is reset. ABORTED, or WRONG_VERSION in a group (whose other members wait in vain)
    1   the chunk's own outcome: not 0 if its source was already further than the version it wanted; until the next
        chunk nothing is stored that others see

Only the slab's owner writes a version, with a release at system scope, so whoever reads it may read the state. A slot
has a version for each of its buffers (what never changes of a state may be read as soon as any of them has it), and a
sequence word for processes that sleep; nobody sleeps here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tetrion.kernels.barrier import ABORT_INTERVAL, ABORTED, CACHE_LINE, system_fence
from tetrion.kernels.chunk_words import (
    HEADER_WORDS,
    end_buffer,
    end_version,
    slot_of,
    source_of,
    start_buffer,
    start_version,
)
from tetrion.kernels.group_table import slab_pointer

WRONG_VERSION = 2
NUM_BUFFERS: tl.constexpr = tl.constexpr(3)
"""Of a slot (engine/parallel/layout.py)."""
LANES: tl.constexpr = tl.constexpr(4)
NUM_STATUS_WORDS = 2


class SlotVersions:
    """The kernels with what they all work on."""

    def __init__(
        self, chunk: Tensor, bases: Tensor, abort: Tensor, status: Tensor, *, device_id: int, versions_offset: int
    ) -> None:
        """bases, abort, device_id: as in barrier.py. chunk: see chunk_words.py. status: int32 [NUM_STATUS_WORDS].

        versions_offset: of the versions in every slab, in bytes; those of slot s begin at `versions_offset + 64 s`.
        """
        assert chunk.dtype == abort.dtype == status.dtype == torch.int32, "words are int32"
        assert len(chunk) >= HEADER_WORDS and len(status) == NUM_STATUS_WORDS, f"{len(chunk)}, {len(status)} words"
        assert bases.dtype == torch.int64 and versions_offset % CACHE_LINE == 0, f"versions at {versions_offset}"
        self._arguments = (chunk, bases, abort, status, device_id, versions_offset // 8)

    def wait(self) -> None:
        """Enqueue: wait until the source's start buffer has reached the start version. This device's own is invalid
        then."""
        _wait[(1,)](
            *self._arguments,
            LONGS_APART=CACHE_LINE // 8,
            INTERVAL=ABORT_INTERVAL,
            ABORTED_STATUS=ABORTED,
            INTERPRETED=triton.knobs.runtime.interpret,
            num_warps=1,
        )

    def wait_for_state(self) -> None:
        """Enqueue: wait until the source's slot holds the start version's state, after whatever number of steps."""
        _wait_for_state[(1,)](
            *self._arguments,
            LONGS_APART=CACHE_LINE // 8,
            INTERVAL=ABORT_INTERVAL,
            ABORTED_STATUS=ABORTED,
            INTERPRETED=triton.knobs.runtime.interpret,
            num_warps=1,
        )

    def confirm(self, *, in_group: bool) -> None:
        """Enqueue, after the state was copied: if the source still has the start version, so has this device's."""
        _confirm[(1,)](
            *self._arguments, LONGS_APART=CACHE_LINE // 8, WRONG=WRONG_VERSION, IN_GROUP=in_group, num_warps=1
        )

    def invalidate(self) -> None:
        """Enqueue, once all members have arrived: the end buffer is about to change, unless something went wrong."""
        _invalidate[(1,)](*self._arguments, LONGS_APART=CACHE_LINE // 8, ABORTED_STATUS=ABORTED, num_warps=1)

    def publish(self) -> None:
        """Enqueue, after all writes to the end buffer: it has the end version, unless something went wrong."""
        _publish[(1,)](*self._arguments, LONGS_APART=CACHE_LINE // 8, ABORTED_STATUS=ABORTED, num_warps=1)


@triton.jit
def _words_pointer(bases, device, versions, slot, LONGS_APART: tl.constexpr):
    """The words of a slot: first its buffers' versions."""
    return slab_pointer(bases, device, tl.int64) + versions + slot * LONGS_APART


@triton.jit
def _publish_version(bases, device, versions, slot, buffer, version, LONGS_APART: tl.constexpr):
    ours = _words_pointer(bases, device, versions, slot, LONGS_APART) + buffer
    tl.atomic_xchg(ours, version, sem="release", scope="sys")


@triton.jit(do_not_specialize=["me", "versions"])
def _wait_for_state(
    chunk,
    bases,
    abort,
    status,
    me,
    versions,
    LONGS_APART: tl.constexpr,
    INTERVAL: tl.constexpr,
    ABORTED_STATUS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    wanted = start_version(chunk)
    if (tl.load(status) == 0) & (wanted != 0):
        lane_B = tl.arange(0, LANES)
        theirs = _words_pointer(bases, source_of(chunk), versions, slot_of(chunk), LONGS_APART) + lane_B
        waiting = 1
        looks = 0
        while waiting > 0:
            found_B = tl.load(theirs, mask=lane_B < NUM_BUFFERS, other=0, volatile=True)
            is_there_B = (found_B != 0) & ((found_B >> 32) == (wanted >> 32))
            waiting = 1 - tl.max(is_there_B.to(tl.int32), axis=0)
            looks += 1
            if looks % INTERVAL == 0:  # noqa: SIM102 - here `and` would read the host's word at every look
                if tl.load(abort, volatile=True) != 0:
                    tl.store(status, ABORTED_STATUS)
                    waiting = 0
        if not INTERPRETED:
            system_fence(looks)


@triton.jit(do_not_specialize=["me", "versions"])
def _wait(
    chunk,
    bases,
    abort,
    status,
    me,
    versions,
    LONGS_APART: tl.constexpr,
    INTERVAL: tl.constexpr,
    ABORTED_STATUS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    tl.store(status + 1, 0)
    wanted = start_version(chunk)
    if (tl.load(status) == 0) & (wanted != 0):
        slot = slot_of(chunk)
        source = source_of(chunk)
        buffer = start_buffer(chunk)
        theirs = _words_pointer(bases, source, versions, slot, LONGS_APART) + buffer
        waiting = 1
        looks = 0
        while waiting > 0:
            found = tl.load(theirs, volatile=True)
            earlier = (found & 0xFFFFFFFF) < (wanted & 0xFFFFFFFF)
            waiting = (((found >> 32) != (wanted >> 32)) | earlier).to(tl.int32)
            looks += 1
            if looks % INTERVAL == 0:  # noqa: SIM102 - here `and` would read the host's word at every look
                if tl.load(abort, volatile=True) != 0:
                    tl.store(status, ABORTED_STATUS)
                    waiting = 0
        if not INTERPRETED:
            system_fence(looks)
        if source != me:
            tl.store(_words_pointer(bases, me, versions, slot, LONGS_APART) + buffer, 0)


@triton.jit(do_not_specialize=["me", "versions"])
def _confirm(
    chunk,
    bases,
    abort,
    status,
    me,
    versions,
    LONGS_APART: tl.constexpr,
    WRONG: tl.constexpr,
    IN_GROUP: tl.constexpr,
):
    wanted = start_version(chunk)
    if (tl.load(status) == 0) & (wanted != 0):
        slot = slot_of(chunk)
        source = source_of(chunk)
        buffer = start_buffer(chunk)
        if tl.load(_words_pointer(bases, source, versions, slot, LONGS_APART) + buffer, volatile=True) != wanted:
            tl.store(status + 1, WRONG)
            if IN_GROUP:
                tl.store(status, WRONG)
        elif source != me:
            _publish_version(bases, me, versions, slot, buffer, wanted, LONGS_APART)


@triton.jit(do_not_specialize=["me", "versions"])
def _invalidate(
    chunk,
    bases,
    abort,
    status,
    me,
    versions,
    LONGS_APART: tl.constexpr,
    ABORTED_STATUS: tl.constexpr,
):
    if (tl.load(status) | tl.load(status + 1)) == 0:
        if tl.load(abort, volatile=True) != 0:
            tl.store(status, ABORTED_STATUS)
        elif end_version(chunk) != 0:
            tl.store(_words_pointer(bases, me, versions, slot_of(chunk), LONGS_APART) + end_buffer(chunk), 0)


@triton.jit(do_not_specialize=["me", "versions"])
def _publish(chunk, bases, abort, status, me, versions, LONGS_APART: tl.constexpr, ABORTED_STATUS: tl.constexpr):
    if (tl.load(status) == 0) & (tl.load(status + 1) == 0):
        if tl.load(abort, volatile=True) != 0:
            tl.store(status, ABORTED_STATUS)
        elif end_version(chunk) != 0:
            version = end_version(chunk)
            _publish_version(bases, me, versions, slot_of(chunk), end_buffer(chunk), version, LONGS_APART)
