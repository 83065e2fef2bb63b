"""Pairwise counters: barriers of any group of devices, with nothing to create when a group is formed.

Owns waiting for peers (bounded, abortable); knows no tensors and no token ranges.

For every ordered pair (sender, receiver) the receiver's slab has one counter that only the sender writes. Both ends
keep the number of barriers the pair has passed since the last reset. A barrier of `members` on device `me`:

    1. for each other member p:  barriers[p] += 1;  slab[p].counter[me] = barriers[p];  wake p
    2. for each other member p:  wait until slab[me].counter[p] has reached barriers[p]

All arrivals go out before the first wait. A peer may be one barrier ahead (it arrived at the next one before we
looked), hence "reached" and not "equal": the difference modulo 2^32 is below 2^31. This works if any two devices run
the groups that contain both in the same order, which the engine sees to: it issues commands from one plan, workers are
FIFO.

A wait looks at the word for up to `spin_s`, giving way to other processes in between, then blocks in the kernel for at
most `POLL_S` at a time; it reads this device's abort word every time it looks. Why data written before a barrier can
be read after it: see words.py.

After an abort counters of a group's members may disagree. Once every survivor is idle each device resets (its own
counters, counts and abort word); only when all have reported may new groups run.
"""

import os
import time
from collections.abc import Callable, Sequence
from functools import partial

from tetrion.engine.parallel.layout import NUM_BUFFERS, SlabLayout
from tetrion.engine.parallel.words import (
    WORD_MASK,
    AbortWords,
    SharedWord,
    SlotVersion,
    Waiter,
    is_of_state,
    reaches,
)

SPIN_S = 100e-6
POLL_S = 0.02


class Aborted(Exception):
    """The engine set this device's abort word; whatever was being computed must not be used."""


class PairwiseBarrier:
    """One device's end of all barriers. `buffers[d]` is device d's slab; `control` the engine's control segment."""

    def __init__(
        self,
        layout: SlabLayout,
        device_id: int,
        buffers: Sequence[memoryview],
        control: memoryview,
        *,
        spin_s: float = SPIN_S,
    ) -> None:
        assert len(buffers) == layout.num_devices, f"{len(buffers)} slabs for {layout.num_devices} devices"
        self.device_id = device_id
        self._layout, self._buffers = layout, buffers
        self._waiter = Waiter()
        self._spin_ns = int(spin_s * 1e9)
        devices = range(layout.num_devices)
        self._incoming = [SharedWord(buffers[device_id], layout.counter_offset(peer)) for peer in devices]
        self._outgoing = [SharedWord(buffers[peer], layout.counter_offset(device_id)) for peer in devices]
        self._barriers = [0] * layout.num_devices
        self._abort = AbortWords(control, layout.num_devices)

    def arrive_and_wait(self, members: Sequence[int]) -> None:
        """Return once every member has arrived. Raises Aborted. A group of one returns at once."""
        assert self.device_id in members, f"device {self.device_id} is not in group {tuple(members)}"
        self.check_abort()
        peers = [peer for peer in members if peer != self.device_id]
        for peer in peers:
            word, self._barriers[peer] = self._outgoing[peer], self._barriers[peer] + 1
            self._waiter.fence(word)
            word.store(self._barriers[peer])
            self._waiter.wake(word)
        for peer in peers:
            self._wait_until(self._incoming[peer], partial(has_reached, expected=self._barriers[peer]))

    def wait_version(self, device: int, slot: int, buffer: int, at_least: int) -> None:
        """Return once a buffer of `slot` on `device` holds the state of `at_least` after at least as many steps. Raises
        Aborted."""
        version = self._version(device, slot, buffer)
        self.check_abort()
        self._wait_until(version.sequence, lambda _: reaches(version.load(), at_least))

    def wait_state(self, device: int, slot: int, version: int) -> None:
        """Return once some buffer of `slot` on `device` holds the state of `version`, after any number of steps. Raises
        Aborted."""
        theirs = [self._version(device, slot, buffer) for buffer in range(NUM_BUFFERS)]
        self.check_abort()
        self._wait_until(theirs[0].sequence, lambda _: any(is_of_state(buffer.load(), version) for buffer in theirs))

    def check_abort(self) -> None:
        """Raises Aborted if the engine has set this device's abort word."""
        if self._abort.is_set(self.device_id):
            raise Aborted(f"device {self.device_id}: the engine aborted what was running")

    def reset(self) -> None:
        """Forget all barriers and the abort. Only while every device is idle, on every device before the next group."""
        for word in self._incoming:
            word.store(0)
        self._barriers = [0] * len(self._barriers)
        self._abort.clear(self.device_id)

    def _version(self, device: int, slot: int, buffer: int) -> SlotVersion:
        return SlotVersion(self._buffers[device], self._layout.version_offset(slot), buffer, self._waiter)

    def _wait_until(self, word: SharedWord, reached: Callable[[int], bool]) -> None:
        """The word is loaded before `reached` looks at anything else, so that a later change is not slept through."""
        deadline_ns = time.monotonic_ns() + self._spin_ns
        while not reached(seen := self._load(word)):
            self.check_abort()
            if time.monotonic_ns() < deadline_ns:
                os.sched_yield()
            else:
                self._waiter.wait(word, seen, POLL_S)
        self._waiter.fence(word)

    def _load(self, word: SharedWord) -> int:
        seen = word.load()
        self._waiter.fence(word)
        return seen


def has_reached(count: int, expected: int) -> bool:
    """Whether a 32-bit counter that wraps is at `expected` or beyond."""
    return (count - expected) & WORD_MASK < 1 << 31
