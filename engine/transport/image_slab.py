"""Slots of shared memory in which workers leave pictures and latents for the engine, or it leaves pictures for them.

Owns one segment cut into equal slots, and on the engine's side which of them are free. Does not know who uses a slot
or when its content is complete: an event says that, and the ring that carries it orders the bytes before it.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tetrion.engine.transport.segment import Backing, SharedSegment

_PAGE_BYTES = 4096


class ImageSlab:
    """`num_slots` slots of `slot_bytes` each (rounded up to whole pages). The engine creates it, workers attach.

    Only the creator hands out slots. Between `acquire` and `release` one side writes a slot, then the other reads it:
    of results a worker and the engine, of a request's pictures the engine and the worker that encodes them.
    """

    def __init__(self, segment: SharedSegment, num_slots: int, free: list[int] | None) -> None:
        """Internal: owns `segment`. Use `create` or `attach`."""
        self._segment = segment
        self._free = free
        self.num_slots = num_slots
        self.slot_bytes = segment.num_bytes // num_slots

    @classmethod
    def create(cls, num_slots: int, slot_bytes: int, *, name: str = "images", backing: Backing = "auto") -> Self:
        """All slots free. Raises SharedMemoryError if there is no room, ValueError unless both numbers are positive."""
        if num_slots < 1 or slot_bytes < 1:
            raise ValueError(f"image slab: num_slots and slot_bytes must be positive, got {num_slots}, {slot_bytes}")
        slot_bytes += -slot_bytes % _PAGE_BYTES
        segment = SharedSegment.create(name, num_slots * slot_bytes, backing=backing)
        return cls(segment, num_slots, list(reversed(range(num_slots))))

    @classmethod
    def attach(cls, fd: int, *, num_slots: int, slot_bytes: int) -> Self:
        """The same slots in a worker, which inherited the creator's `fd` and owns it from here on.

        `slot_bytes` as the creator's attribute says, that is, rounded up.
        """
        return cls(SharedSegment.attach(fd, num_slots * slot_bytes), num_slots, None)

    @property
    def fd(self) -> int:
        """The descriptor to pass on."""
        return self._segment.fd

    @property
    def num_free(self) -> int:
        return len(self._free_slots())

    def acquire(self) -> int | None:
        """A slot for the caller alone (engine side); None if all are taken."""
        free = self._free_slots()
        return free.pop() if free else None

    def release(self, slot: int) -> None:
        """Give a slot back (engine side). Raises ValueError for one that is out of bounds or not taken."""
        self._check(slot)
        if slot in self._free_slots():
            raise ValueError(f"slot {slot} is released twice")
        self._free_slots().append(slot)

    def view(self, slot: int, shape: tuple[int, ...], dtype: npt.DTypeLike = np.uint8) -> npt.NDArray[Any]:
        """The start of a slot as a writable array, e.g. uint8 RGB [height, width, 3]; no copy.

        Raises ValueError with the numbers if the slot does not exist or is too small, or for another dtype than
        uint8 and float32.
        """
        self._check(slot)
        element = np.dtype(dtype)
        if element not in (np.dtype(np.uint8), np.dtype(np.float32)):
            raise ValueError(f"slot {slot}: expected a uint8 or float32 array, got {element}")
        wanted = prod(shape) * element.itemsize
        if min(shape, default=1) < 1 or wanted > self.slot_bytes:
            raise ValueError(f"{element} array of shape {shape}: {wanted:,} bytes, a slot has {self.slot_bytes:,}")
        return self._segment.array(element, shape, slot * self.slot_bytes)

    def write(self, slot: int, array: npt.NDArray[Any]) -> None:
        """Copy a uint8 or float32 array to the start of a slot. Raises ValueError as `view` does."""
        self.view(slot, array.shape, array.dtype)[...] = array

    def read(self, slot: int, shape: tuple[int, ...], dtype: npt.DTypeLike = np.uint8) -> npt.NDArray[Any]:
        """A copy of what `view` shows, valid after the slot is released."""
        return self.view(slot, shape, dtype).copy()

    def write_all(self, slot: int, arrays: Sequence[npt.NDArray[np.uint8]]) -> None:
        """Copy uint8 arrays to the start of a slot, one behind the other. Raises ValueError as `view` does."""
        for array, place in zip(arrays, self.view_all(slot, [array.shape for array in arrays]), strict=True):
            place[...] = array

    def view_all(self, slot: int, shapes: Sequence[tuple[int, ...]]) -> list[npt.NDArray[np.uint8]]:
        """Where `write_all` puts arrays of these shapes; no copy. Raises ValueError as `view` does."""
        sizes = [prod(shape) for shape in shapes]
        if not sizes:
            return []
        whole, ends = self.view(slot, (sum(sizes),)), list(accumulate(sizes))
        return [whole[end - size : end].reshape(s) for size, end, s in zip(sizes, ends, shapes, strict=True)]

    def close(self) -> None:
        """Unmap. Arrays from `view` that are still in use keep the memory until they go."""
        self._segment.close()

    def _check(self, slot: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise ValueError(f"slot {slot} is out of bounds: this slab has slots 0 to {self.num_slots - 1}")

    def _free_slots(self) -> list[int]:
        if self._free is None:
            raise RuntimeError("slots are handed out by the engine; a worker uses the slot that its command names")
        return self._free
