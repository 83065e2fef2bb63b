"""This device's slab as torch tensors, and where all slabs begin, for kernels that reach them by address.

Owns the table of addresses; knows neither where the memory comes from (memory.py) nor who may touch what when
(exchange.py). Kernels alone reach other devices' slabs: a torch tensor over another GPU's memory would make torch open
a context there.
"""

import torch
from torch import Tensor

from tetrion.engine.parallel.gpu.raw_memory import tensor_at
from tetrion.engine.parallel.layout import CACHE_LINE, SlabLayout
from tetrion.engine.parallel.slab_tensors import SlabTensors


class GpuSlabs(SlabTensors):
    """`bases[d]`: address of device d's slab, int64, on this device; 0 while it is not mapped."""

    def __init__(self, layout: SlabLayout, device_id: int, device: torch.device) -> None:
        super().__init__(layout, device_id)
        self.device = device
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

    def counters(self) -> Tensor:
        """The barrier counters in this device's slab, int32 [num_devices, words of a cache line]."""
        shape = (self.layout.num_devices, CACHE_LINE // 4)
        return self.view(self.device_id, self.layout.counters_offset, shape, torch.int32)

    def view(self, device: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert self.device.type == "cpu" or device == self.device_id, f"device {device}'s slab is for kernels only"
        assert self._addresses[device], f"device {device}'s slab is not mapped"
        return tensor_at(self._addresses[device] + offset, shape, dtype, self.device)
