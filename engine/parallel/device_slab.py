"""This device's slab as torch tensors, and where all slabs begin, for kernels that reach them by address.

Owns the shapes of what lies in a slab, and the table of addresses; knows neither where the memory comes from
(device_memory.py) nor who may touch what when (device_exchange.py). Kernels alone reach other devices' slabs: a torch
tensor over another GPU's memory would make torch open a context there.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tetrion.engine.parallel.layout import CACHE_LINE, SlabLayout
from tetrion.engine.parallel.raw_memory import tensor_at
from tetrion.engine.parallel.shared_slab import DTYPES


class DeviceSlot(NamedTuple):
    """A request's state in one slot of this device: shapes as in `SlotState`. Kernels write its version."""

    text: Tensor
    pooled: Tensor
    latents: Tensor


class DeviceSlabs:
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

    def slot(self, device: int, slot: int) -> DeviceSlot:
        layout = self.layout
        return DeviceSlot(
            text=self._view(device, layout.text_offset(slot), (layout.max_text_tokens, layout.text_dim), self.dtype),
            pooled=self._view(device, layout.pooled_offset(slot), (layout.pooled_dim,), self.dtype),
            latents=self._view(
                device, layout.latents_offset(slot), (layout.max_image_tokens, layout.in_channels), torch.float32
            ),
        )

    def qkv(self, device: int, num_tokens: int, num_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """The exchange regions: q, k, v of the device's heads for all tokens, [num_tokens, num_heads, head_dim]."""
        shape, layout = (num_tokens, num_heads, head_dim), self.layout
        self._check_fits(shape, layout.exchange_bytes)
        offsets = layout.q_offset, layout.k_offset, layout.v_offset
        q, k, v = (self._view(device, offset, shape, self.dtype) for offset in offsets)
        return q, k, v

    def output(self, device: int, num_tokens: int, num_heads: int, head_dim: int) -> Tensor:
        """The output region: all heads of the device's own tokens, [num_tokens, num_heads, head_dim]."""
        shape = (num_tokens, num_heads, head_dim)
        self._check_fits(shape, self.layout.output_bytes)
        return self._view(device, self.layout.output_offset, shape, self.dtype)

    def counters(self) -> Tensor:
        """The barrier counters in this device's slab, int32 [num_devices, words of a cache line]."""
        shape = (self.layout.num_devices, CACHE_LINE // 4)
        return self._view(self.device_id, self.layout.counters_offset, shape, torch.int32)

    def _view(self, device: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert self.device.type == "cpu" or device == self.device_id, f"device {device}'s slab is for kernels only"
        assert self._addresses[device], f"device {device}'s slab is not mapped"
        return tensor_at(self._addresses[device] + offset, shape, dtype, self.device)

    def _check_fits(self, shape: tuple[int, ...], num_bytes: int) -> None:
        wanted = torch.Size(shape).numel() * self.layout.itemsize
        assert wanted <= num_bytes, f"{shape} takes {wanted} bytes of a region of {num_bytes}"
