"""Words of shared memory by which processes tell each other how far they are, and how to wait on them.

Owns 32-bit words, slot versions, abort words and how to block on a word; knows no torch and no groups.

Every word has ONE writer, so no atomic read-modify-write is needed, only stores and loads that do not tear. A
memoryview of format "I" or "Q" copies 4 or 8 aligned bytes with a compile-time constant size in CPython: one move
instruction.

Memory order. A writer stores data (torch operators), then the word; a reader loads the word, then the data.
* In the writer's thread the operator's stores precede the word's in program order. Intra-op threads are joined before
  the operator returns, and that join is a synchronisation: their stores are visible before anything later here.
* x86-64 keeps stores in order and loads in order (TSO), so a reader that sees the word sees the data. Streaming stores,
  which TSO does not cover, have drained: torch takes the interpreter lock again when an operator returns, and pool
  threads pass a join; both are locked instructions.
* On AArch64 a full fence stands before the word's store and after its load: FUTEX_WAKE (the kernel's waker side begins
  with a full barrier, which its own waiter-count protocol needs). Other platforms are refused.
"""

import ctypes
import errno
import platform
import sys

from tetrion.engine.parallel.layout import NUM_BUFFERS, ControlLayout

WORD_MASK = 0xFFFF_FFFF
INVALID_VERSION = 0
FUTEX_WAIT, FUTEX_WAKE = 0, 1
FUTEX_SYSCALLS = {"x86_64": 202, "aarch64": 98}


class SharedWord:
    """One aligned unsigned 32-bit word of a writable shared buffer, which it keeps mapped."""

    def __init__(self, buffer: memoryview, offset: int) -> None:
        self._view = buffer.cast("B")[offset : offset + 4].cast("I")
        self.address = ctypes.addressof(ctypes.c_uint32.from_buffer(self._view))
        assert self.address % 4 == 0, f"word at byte {offset} is not aligned"

    def load(self) -> int:
        return self._view[0]

    def store(self, value: int) -> None:
        self._view[0] = value & WORD_MASK


class Waiter:
    """Blocks on a word that another process will change, by a shared futex (no PRIVATE flag): words may lie in any
    shared mapping. Linux on x86-64 and AArch64.

    The writer wakes after every store: the kernel compares the word with `seen` under the lock that wakers take, so no
    wake-up is lost, and no flag is needed to tell whether somebody sleeps.
    """

    def __init__(self) -> None:
        """Raises RuntimeError on other platforms."""
        machine = platform.machine()
        if sys.platform != "linux" or machine not in FUTEX_SYSCALLS:
            raise RuntimeError(f"expected Linux on {' or '.join(FUTEX_SYSCALLS)}, this is {sys.platform} on {machine}")
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._syscall.restype = ctypes.c_long
        pointer, word = ctypes.c_void_p, ctypes.c_uint32
        self._syscall.argtypes = [ctypes.c_long, pointer, ctypes.c_int, word, pointer, pointer, ctypes.c_int]
        self._number = FUTEX_SYSCALLS[machine]
        self._fence_needed = machine != "x86_64"

    def wait(self, word: SharedWord, seen: int, timeout_s: float) -> None:
        """Block while the word is `seen`, at most `timeout_s`; may return early for no reason."""
        timeout = (ctypes.c_int64 * 2)(int(timeout_s), int(timeout_s % 1 * 1e9))  # struct timespec
        self._call(word, FUTEX_WAIT, seen, ctypes.byref(timeout))

    def wake(self, word: SharedWord) -> None:
        """Called after every store to the word: lets those who wait on it look again."""
        self._call(word, FUTEX_WAKE, 0x7FFF_FFFF, None)

    def fence(self, word: SharedWord) -> None:
        """Order all earlier loads and stores before all later ones, where the CPU does not do so unasked."""
        if self._fence_needed:
            self.wake(word)

    def _call(self, word: SharedWord, operation: int, value: int, timeout: object) -> None:
        if self._syscall(self._number, word.address, operation, value, timeout, None, 0) < 0:
            code = ctypes.get_errno()
            if code not in (errno.EAGAIN, errno.ETIMEDOUT, errno.EINTR):
                raise OSError(code, f"futex operation {operation} failed")


class SlotVersion:
    """Whose state a buffer of a slot holds, and after how many steps: one 64-bit word, written by the slab's owner
    alone.

    Value: see `slot_version`; INVALID_VERSION: the buffer holds nothing that may be read. What never changes of a state
    may be read as soon as any buffer holds that state, whatever its steps. A slot's words are a cache line: NUM_BUFFERS
    versions; the sequence, 32 bits, which changes at every store, after the version, and is what waiters block on: the
    version's own low half need not change when another request takes the slot.
    """

    def __init__(self, slab: memoryview, offset: int, buffer: int, waiter: Waiter) -> None:
        """`offset`: of the slot's words in `slab`."""
        assert 0 <= buffer < NUM_BUFFERS, f"buffer {buffer} of {NUM_BUFFERS}"
        self._view = slab.cast("B")[offset + 8 * buffer : offset + 8 * (buffer + 1)].cast("Q")
        self.sequence = SharedWord(slab, offset + 8 * NUM_BUFFERS)
        self._waiter = waiter

    def load(self) -> int:
        return self._view[0]

    def store(self, value: int) -> None:
        self._waiter.fence(self.sequence)
        self._view[0] = value
        self._waiter.fence(self.sequence)
        self.sequence.store(self.sequence.load() + 1)
        self._waiter.wake(self.sequence)


def slot_version(state_id: int, step_index: int) -> int:
    """The version of a state after `step_index` steps (0: prompt encoded, noise drawn): id high, steps + 1 low.

    `state_id` is the message's: unique per attempt at a request, so that what an earlier owner left in a slot is never
    taken for this one's. Its low 32 bits are kept.
    """
    assert state_id >= 0 and 0 <= step_index < WORD_MASK, f"state {state_id}, step index {step_index}"
    return (state_id & WORD_MASK) << 32 | step_index + 1


def reaches(version: int, at_least: int) -> bool:
    """Whether `version` is of the same state as `at_least`, and at least as many steps on."""
    return is_of_state(version, at_least) and version & WORD_MASK >= at_least & WORD_MASK


def is_of_state(version: int, other: int) -> bool:
    """Whether `version` is valid and of the same state as `other`."""
    return version != INVALID_VERSION and version >> 32 == other >> 32


class AbortWords:
    """The abort words in the control segment: the engine sets and clears them, a device clears its own at its reset.

    Set: every wait of that device ends with `Aborted` within the poll interval. Cleared only while all survivors are
    idle (the engine aborts nobody between `ResetBarriers` and its acknowledgement): no abort is overwritten unseen.
    """

    def __init__(self, control: memoryview, num_devices: int) -> None:
        layout = ControlLayout(num_devices=num_devices)
        self._words = [SharedWord(control, layout.abort_offset(device)) for device in range(num_devices)]

    def set(self, device: int) -> None:
        self._words[device].store(1)

    def clear(self, device: int) -> None:
        self._words[device].store(0)

    def is_set(self, device: int) -> bool:
        return self._words[device].load() != 0
