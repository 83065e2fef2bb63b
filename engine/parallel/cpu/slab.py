"""All devices' slabs as torch tensors over shared memory: views only, nothing is copied or allocated.

Owns the shapes of what lies in a slab; knows no groups and no barriers: who may touch what when is exchange.py's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tetrion.engine.parallel.layout import FieldPlace, Piece, SlabLayout
from tetrion.engine.parallel.words import SlotVersion, Waiter

DTYPES = {4: torch.float32, 2: torch.bfloat16}


class SharedSlabs:
    """`buffers[d]`: device d's whole slab, writable, mapped into this process."""

    def __init__(
        self,
        layout: SlabLayout,
        device_id: int,
        buffers: Sequence[memoryview],
    ) -> None:
        assert len(buffers) == layout.num_devices, f"{len(buffers)} slabs for {layout.num_devices} devices"
        assert all(buffer.nbytes >= layout.num_bytes for buffer in buffers), f"slabs need {layout.num_bytes} bytes"
        self.layout = layout
        self.device_id = device_id
        self.dtype = DTYPES[layout.itemsize]
        self._buffers = [buffer.cast("B") for buffer in buffers]
        self._waiter = Waiter()

    def constants(self, device: int, model: str, slot: int, branch: int = 0) -> dict[str, Tensor]:
        """What steps do not change of a request, by field: [max rows, width] of a branch. Rows beyond the request's own
        are left over."""
        places = [place for place in self.layout.slots[model].places if not place.field.changes]
        return {
            place.field.name: self._part(device, place, slot, branch if place.field.per_branch else 0)
            for place in places
        }

    def state(self, device: int, model: str, slot: int, buffer: int) -> Tensor:
        """What steps change, in one of the slot's buffers: [max rows, width]."""
        return self._part(device, self.layout.slots[model].latents, slot, buffer)

    def version(self, device: int, slot: int, buffer: int) -> SlotVersion:
        """Of a buffer; to be written after its tensor, and only on the device that owns the slab."""
        return SlotVersion(self._buffers[device], self.layout.version_offset(slot), buffer, self._waiter)

    def copy(self, piece: Piece, slot: int, source: int) -> None:
        """A piece of the slot on `source` to the same place on this device."""
        start = self.layout.slot_offset(slot) + piece.offset
        where = slice(start, start + piece.num_bytes)
        self._buffers[self.device_id][where] = self._buffers[source][where]

    def qkv(self, device: int, num_rows: int, num_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """The exchange regions of `device`: q, k, v of its heads for all rows, [num_rows, num_heads, head_dim]."""
        shape = (num_rows, num_heads, head_dim)
        self._check_fits(shape, self.layout.exchange_bytes)
        offsets = self.layout.q_offset, self.layout.k_offset, self.layout.v_offset
        q, k, v = (self._view(device, offset, shape) for offset in offsets)
        return q, k, v

    def output(self, device: int, num_rows: int, num_heads: int, head_dim: int) -> Tensor:
        """The output region of `device`: all heads of its own rows, [num_rows, num_heads, head_dim]."""
        shape = (num_rows, num_heads, head_dim)
        self._check_fits(shape, self.layout.output_bytes)
        return self._view(device, self.layout.output_offset, shape)

    def velocity(self, device: int, num_rows: int, width: int) -> Tensor:
        """The velocity region of `device`: [num_rows, width]."""
        self._check_fits((num_rows, width), self.layout.velocity_bytes)
        return self._view(device, self.layout.velocity_offset, (num_rows, width))

    def _part(self, device: int, place: FieldPlace, slot: int, part: int) -> Tensor:
        piece = place.piece(place.max_rows, part)
        shape, dtype = (place.max_rows, place.field.width), torch.float32 if place.field.fp32 else self.dtype
        return self._view(device, self.layout.slot_offset(slot) + piece.offset, shape, dtype)

    def _view(self, device: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        count, dtype = torch.Size(shape).numel(), dtype or self.dtype
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._buffers[device], dtype=dtype, count=count, offset=offset).view(shape)

    def _check_fits(self, shape: tuple[int, ...], num_bytes: int) -> None:
        wanted = torch.Size(shape).numel() * self.layout.itemsize
        assert wanted <= num_bytes, f"{shape} takes {wanted} bytes of a region of {num_bytes}"
