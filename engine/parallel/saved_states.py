"""Requests' states as they stood after each chunk of steps, in host memory that outlasts every worker.

The first member of a group saves there what its chunk has made; a request whose holders are all lost, or whose slot
was taken from it, goes on from that. A slot has as many buffers here as in a slab, so that what the last finished chunk
saved stays as it was while the next ones run. Owns the places; who may read what when is the engine's.
"""

import math
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tetrion.engine.parallel.layout import FP32_BYTES, NUM_BUFFERS, SlabLayout
from tetrion.engine.transport.segment import SharedSegment


class SavedStates:
    """One segment for all devices. States are fp32 [rows, width]."""

    def __init__(self, segment: SharedSegment, layout: SlabLayout) -> None:
        self.segment = segment
        self._num_slots, self._state_bytes = layout.num_slots, layout.state_bytes

    @classmethod
    def create(cls, layout: SlabLayout) -> Self:
        """Raises SharedMemoryError if memory does not suffice."""
        return cls(SharedSegment.create("states", saved_bytes(layout)), layout)

    @classmethod
    def attach(cls, fd: int, layout: SlabLayout) -> Self:
        return cls(SharedSegment.attach(fd, saved_bytes(layout)), layout)

    def view(self, slot: int, chunk_index: int, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
        """The place of a request's state that has `chunk_index` chunks behind it, writable; no copy."""
        assert 0 <= slot < self._num_slots, f"slot {slot} of {self._num_slots}"
        assert math.prod(shape) * FP32_BYTES <= self._state_bytes, f"{shape} in {self._state_bytes} bytes"
        place = slot * NUM_BUFFERS + chunk_index % NUM_BUFFERS
        array: npt.NDArray[Any] = self.segment.array(np.float32, shape, place * self._state_bytes)
        return array

    def close(self) -> None:
        self.segment.close()


def saved_bytes(layout: SlabLayout) -> int:
    return layout.num_slots * NUM_BUFFERS * layout.state_bytes
