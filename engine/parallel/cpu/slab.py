"""All devices' slabs as torch tensors over shared memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tetrion.engine.parallel.layout import Piece, SlabLayout
from tetrion.engine.parallel.slab_tensors import SlabTensors
from tetrion.engine.parallel.words import SlotVersion, Waiter


class SharedSlabs(SlabTensors):
    """`buffers[d]`: device d's whole slab, writable, mapped into this process."""

    def __init__(
        self,
        layout: SlabLayout,
        device_id: int,
        buffers: Sequence[memoryview],
    ) -> None:
        assert len(buffers) == layout.num_devices, f"{len(buffers)} slabs for {layout.num_devices} devices"
        assert all(buffer.nbytes >= layout.num_bytes for buffer in buffers), f"slabs need {layout.num_bytes} bytes"
        super().__init__(layout, device_id)
        self._buffers = [buffer.cast("B") for buffer in buffers]
        self._waiter = Waiter()

    def version(self, device: int, slot: int, buffer: int) -> SlotVersion:
        """Of a buffer; to be written after its tensor, and only on the device that owns the slab."""
        return SlotVersion(self._buffers[device], self.layout.version_offset(slot), buffer, self._waiter)

    def copy(self, piece: Piece, slot: int, source: int) -> None:
        """A piece of the slot on `source` to the same place on this device."""
        start = self.layout.slot_offset(slot) + piece.offset
        where = slice(start, start + piece.num_bytes)
        self._buffers[self.device_id][where] = self._buffers[source][where]

    def view(self, device: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel()
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._buffers[device], dtype=dtype, count=count, offset=offset).view(shape)
