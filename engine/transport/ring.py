"""A byte queue in shared memory from one producer to one consumer, both in Python, neither ever holding a lock.

Owns the layout, the order of loads and stores, and the consumer's "I am going to sleep" word; does not know what the
bytes mean nor how the sleeper is woken (`channel` does).
"""

import platform
import threading
from typing import Self

from tetrion.engine.transport.segment import Backing, SharedSegment

_LINE_BYTES = 64
_HEADER_BYTES = 4 * _LINE_BYTES
_FORMAT_WORD, _TAIL_WORD, _HEAD_WORD, _WAITING_WORD = (line * _LINE_BYTES // 8 for line in range(4))
_FORMAT = 0x5445_5452_494F_4E01
_CHECK = 0x9E37_79B9
_LOW_32_BITS = 0xFFFF_FFFF


class MessageTooLong(ValueError):
    """A message that this ring could not hold even when empty."""


class RingFull(RuntimeError):
    """No room now, and the caller cannot wait for any."""


class RingCorrupt(RuntimeError):
    """The words in shared memory contradict each other: a stray write, or two producers or consumers."""


class Ring:
    """Variable-length records, first in first out, one producer process and one consumer process.

    Layout (all words 64-bit, native order; `capacity` is a multiple of 8)::

        offset  0          64          128         192         256                                256 + capacity
                ├ FORMAT ──┼ TAIL ─────┼ HEAD ─────┼ WAITING ──┼ records ─────────────────────────┤
        written │ creator  │ producer  │ consumer  │ consumer  │ producer                         │
                                                                └─ position p lies at 256 + p % capacity

        record  ├ length (32 bits) │ check (32 bits) ┼ length bytes of message ┼ padding to 8 ┤

    TAIL and HEAD count bytes since the start and never go back (2^64 bytes outlast any machine), so full and empty
    cannot be mistaken for one another. HEAD ≤ TAIL ≤ HEAD + capacity, always. Each word has one writer and a cache
    line of its own. A record may run over the end of the area and go on at its start; its header never does, because
    everything is a multiple of 8. `check` mixes length and position: a stale or overwritten header is noticed.

    States of a byte, and who moves it on::

        free ──producer copies the record in── written ──producer stores TAIL── readable
         ▲                                                                         │
         └────────────── consumer stores HEAD ── copied out ◀── consumer copies ───┘

    Order. The producer stores the record *before* TAIL: whoever sees the new TAIL must see the bytes. The consumer
    copies the record out *before* it stores HEAD: whoever sees the new HEAD may overwrite them. A producer that dies
    between the two has written nothing; a consumer that dies has read nothing.

    Why this holds. Words are read and written through a `memoryview` of native 64-bit items: CPython copies eight
    aligned bytes, which compilers turn into one move, so no word is seen half-written (`struct.pack_into("<Q")`
    stores byte by byte and would not do). Each access is a separate call inside the interpreter, so the compiler
    cannot exchange them. x86-64 makes stores visible in program order and performs loads in program order (TSO);
    `memcpy` keeps to that, since glibc ends non-temporal copies with a store fence and stores after a string
    instruction are not seen before its own. On other CPUs `_Fence` runs between record and word, on both sides.

    No wake-up is lost. TSO lets a load overtake an *earlier store* to another address, so both sides of the
    sleep protocol fence, on every CPU (steps by `channel`, in this order)::

        consumer                                         producer
        C1 clear the doorbell                            P1 store TAIL            try_write
        C2 store WAITING = 1   ┐                         P2 fence                 ┐
        C3 fence               │ arm                     P3 load WAITING          ┘ consumer_sleeps
        C4 load TAIL           ┘                         P4 if it was 1: ring the doorbell
        C5 TAIL unchanged: sleep on the doorbell

    Suppose the consumer sleeps though P1 has been executed. At C4 it did not see P1, so by the fences (C2 before
    C4, P1 before P3, each in the order all CPUs see) P3 sees C2's WAITING = 1, and P4 rings. That ring is
    not cleared before the sleep: it came after C1, for had C1 swallowed it, then P1 came before P4 before C1
    before C4, and C4 had seen it. So the doorbell wakes the sleeper. A producer that reads WAITING = 1 too often
    rings needlessly, which costs one spurious wake-up and nothing else.
    """

    def __init__(self, segment: SharedSegment) -> None:
        """Either end of the ring in `segment`, which this object owns. Use `create` or `attach`."""
        self.segment = segment
        self.capacity_bytes = segment.num_bytes - _HEADER_BYTES
        self._words = segment.view[:_HEADER_BYTES].cast("Q")
        self._bytes = segment.view[_HEADER_BYTES:]
        self._record_words = self._bytes.cast("Q")
        self._tail = self._words[_TAIL_WORD]  # the producer's own copy
        self._head = self._words[_HEAD_WORD]  # the consumer's own copy
        self._fence = _Fence()
        self._stores_may_pass_stores = platform.machine().lower() not in ("x86_64", "amd64")

    @classmethod
    def create(cls, name: str, capacity_bytes: int, *, backing: Backing = "auto") -> Self:
        """An empty ring. Raises ValueError on an impossible capacity, SharedMemoryError if there is no room."""
        if capacity_bytes < 64 or capacity_bytes % 8 or capacity_bytes > _LOW_32_BITS:
            raise ValueError(f"ring {name!r}: capacity must be a multiple of 8 from 64 to 2^32, got {capacity_bytes}")
        segment = SharedSegment.create(name, _HEADER_BYTES + capacity_bytes, backing=backing)
        segment.view[:8].cast("Q")[0] = _FORMAT
        return cls(segment)

    @classmethod
    def attach(cls, fd: int, num_bytes: int) -> Self:
        """The other end, in the process that inherited `fd`. Raises RingCorrupt if no ring of this version is there."""
        segment = SharedSegment.attach(fd, num_bytes)
        found = segment.view[:8].cast("Q")[0] if num_bytes > _HEADER_BYTES else 0
        if found != _FORMAT:
            segment.close()
            raise RingCorrupt(f"fd {fd} holds no ring of this version: format word {found:#x}, expected {_FORMAT:#x}")
        return cls(segment)

    @property
    def max_message_bytes(self) -> int:
        return self.capacity_bytes - 8

    # Producer ---------------------------------------------------------------------------------------------------------

    @property
    def free_bytes(self) -> int:
        """Room, headers included. Only the producer may rely on it: it grows behind its back and never shrinks."""
        used = self._tail - self._words[_HEAD_WORD]
        if not 0 <= used <= self.capacity_bytes:
            raise RingCorrupt(f"{used} bytes in use in a ring of {self.capacity_bytes} (tail {self._tail})")
        return self.capacity_bytes - used

    def can_write(self, message_bytes: int) -> bool:
        """Whether a message of that length would be taken now; stays true until the producer writes.

        Raises MessageTooLong if it never would.
        """
        return self._record_bytes(message_bytes) <= self.free_bytes

    def try_write(self, data: bytes) -> bool:
        """Append one message; False, and nothing happens, while there is no room. Raises MessageTooLong."""
        length, tail, capacity = len(data), self._tail, self.capacity_bytes
        record_bytes = 8 + (length + 7 & ~7)
        used = tail - self._words[_HEAD_WORD]
        if used < 0 or used + record_bytes > capacity:
            return self._refuse(length)
        position = tail % capacity
        self._record_words[position >> 3] = length | _check(length, tail) << 32
        start = position + 8
        if start + length <= capacity:
            self._bytes[start : start + length] = data
        else:
            self._write_around(data, start)
        if self._stores_may_pass_stores:
            self._fence()
        self._tail = self._words[_TAIL_WORD] = tail + record_bytes
        return True

    def _refuse(self, message_bytes: int) -> bool:
        """Nothing was written: False for want of room; raises MessageTooLong or RingCorrupt if that is the reason."""
        self.can_write(message_bytes)  # for what it raises: the consumer may have made room since
        return False

    def _write_around(self, data: bytes, start: int) -> None:
        """A message that runs over the end of the area, or begins there."""
        whole = self.capacity_bytes - start
        self._bytes[start:] = data[:whole]
        self._bytes[: len(data) - whole] = data[whole:]

    def consumer_sleeps(self) -> bool:
        """P2 and P3: after a write, whether the doorbell must be rung."""
        self._fence()
        return self._words[_WAITING_WORD] != 0

    # Consumer ---------------------------------------------------------------------------------------------------------

    def try_read(self) -> bytes | None:
        """The oldest message, or None if there is none. Raises RingCorrupt."""
        head = self._head
        readable = self._words[_TAIL_WORD] - head
        if readable == 0:
            return None
        if self._stores_may_pass_stores:
            self._fence()
        length = self._checked_length(head, readable)
        start = (head + 8) % self.capacity_bytes
        data = bytes(self._bytes[start : start + length])
        if len(data) < length:
            data += bytes(self._bytes[: length - len(data)])
        if self._stores_may_pass_stores:
            self._fence()
        self._head = self._words[_HEAD_WORD] = head + 8 + (length + 7 & ~7)
        return data

    def arm(self) -> bool:
        """C2 to C4: announce sleep. True if the ring is still empty, so that sleeping on the doorbell is safe."""
        self._words[_WAITING_WORD] = 1
        self._fence()
        return self._words[_TAIL_WORD] == self._head

    def disarm(self) -> None:
        """Awake again: the producer need not ring."""
        self._words[_WAITING_WORD] = 0

    # Both -------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        self._words.release()
        self._record_words.release()
        self._bytes.release()
        self.segment.close()

    def _record_bytes(self, message_bytes: int) -> int:
        record_bytes = 8 + (message_bytes + 7 & ~7)
        if record_bytes > self.capacity_bytes:
            raise MessageTooLong(
                f"message of {message_bytes:,} bytes; this ring takes at most {self.max_message_bytes:,}"
            )
        return record_bytes

    def _checked_length(self, head: int, readable: int) -> int:
        header = self._record_words[head % self.capacity_bytes >> 3]
        length = header & _LOW_32_BITS
        if header >> 32 != _check(length, head) or readable > self.capacity_bytes or not 0 <= length <= readable - 8:
            raise RingCorrupt(
                f"record at {head:,}: length {length:,} with check {header >> 32:#x}, {readable:,} bytes readable, "
                f"capacity {self.capacity_bytes:,}"
            )
        return length


class _Fence:
    """A full memory fence: no load or store of this thread passes it in either direction.

    Python has none by that name. Releasing and taking an uncontended lock does it: both are atomic read-modify-writes,
    which on x86-64 are locked instructions, that is, full fences. On AArch64 the release keeps what came before it
    before it, the acquire keeps what comes after it after it, and an acquire does not pass an earlier release.
    """

    def __init__(self) -> None:
        lock = threading.Lock()
        lock.acquire()
        self._release, self._acquire = lock.release, lock.acquire

    def __call__(self) -> None:
        self._release()
        self._acquire()


def _check(length: int, position: int) -> int:
    return (length ^ (position >> 3) ^ _CHECK) & _LOW_32_BITS
