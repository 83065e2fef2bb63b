"""This device's slab as torch tensors, and where all slabs begin, for kernels that reach them by address.

Owns the shapes of what lies in a slab, and the table of addresses; knows neither where the memory comes from
(memory.py) nor who may touch what when (exchange.py). Kernels alone reach other devices' slabs: a torch
tensor over another GPU's memory would make torch open a context there.
"""

import torch
from torch import Tensor

from tetrion.engine.parallel.cpu.slab import DTYPES
from tetrion.engine.parallel.gpu.raw_memory import tensor_at
from tetrion.engine.parallel.layout import CACHE_LINE, FieldPlace, SlabLayout


class GpuSlabs:
    """`bases[d]`: address of device d's slab, int64, on this device; 0 while it is not mapped."""

    def __init__(self, layout: SlabLayout, device_id: int, device: torch.device) -> None:
        self.layout, self.device_id, self.device = layout, device_id, device
        self.dtype = DTYPES[layout.itemsize]
        self.bases = torch.zeros(layout.num_devices, dtype=torch.int64, device=device)
        self._addresses = [0] * layout.num_devices

    @property
    def mapped(self) -> tuple[int, ...]:
        """Devices whose slab can be reached."""
        return tuple(device for device, address in enumerate(self._addresses) if address)

    def place(self, device: int, address: int) -> None:
        """From now on the slab of `device` is at `address`; 0: nowhere. Kernels already captured follow."""
        self._addresses[device] = address
        self.bases[device] = address

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

    def qkv(self, device: int, num_rows: int, num_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """The exchange regions: q, k, v of the device's heads for all rows, [num_rows, num_heads, head_dim]."""
        shape, layout = (num_rows, num_heads, head_dim), self.layout
        self._check_fits(shape, layout.exchange_bytes)
        offsets = layout.q_offset, layout.k_offset, layout.v_offset
        q, k, v = (self._view(device, offset, shape, self.dtype) for offset in offsets)
        return q, k, v

    def output(self, device: int, num_rows: int, num_heads: int, head_dim: int) -> Tensor:
        """The output region: all heads of the device's own rows, [num_rows, num_heads, head_dim]."""
        shape = (num_rows, num_heads, head_dim)
        self._check_fits(shape, self.layout.output_bytes)
        return self._view(device, self.layout.output_offset, shape, self.dtype)

    def velocity(self, device: int, num_rows: int, width: int) -> Tensor:
        """The velocity region: [num_rows, width]."""
        self._check_fits((num_rows, width), self.layout.velocity_bytes)
        return self._view(device, self.layout.velocity_offset, (num_rows, width), self.dtype)

    def counters(self) -> Tensor:
        """The barrier counters in this device's slab, int32 [num_devices, words of a cache line]."""
        shape = (self.layout.num_devices, CACHE_LINE // 4)
        return self._view(self.device_id, self.layout.counters_offset, shape, torch.int32)

    def _part(self, device: int, place: FieldPlace, slot: int, part: int) -> Tensor:
        piece = place.piece(place.max_rows, part)
        shape, dtype = (place.max_rows, place.field.width), torch.float32 if place.field.fp32 else self.dtype
        return self._view(device, self.layout.slot_offset(slot) + piece.offset, shape, dtype)

    def _view(self, device: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert self.device.type == "cpu" or device == self.device_id, f"device {device}'s slab is for kernels only"
        assert self._addresses[device], f"device {device}'s slab is not mapped"
        return tensor_at(self._addresses[device] + offset, shape, dtype, self.device)

    def _check_fits(self, shape: tuple[int, ...], num_bytes: int) -> None:
        wanted = torch.Size(shape).numel() * self.layout.itemsize
        assert wanted <= num_bytes, f"{shape} takes {wanted} bytes of a region of {num_bytes}"
