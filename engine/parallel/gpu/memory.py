"""Where slabs of GPU workers come from, how peers' are mapped, and what stands in where GPUs cannot reach each other.

Owns the memory behind `GpuSlabs` and the registered control segment; knows no groups and no requests.

A slab is one plain allocation on its owner's GPU; peers map it through its IPC handle, once, which also switches on
peer access. Handles travel through the engine. Peers must close their mapping of a dead worker's slab before another
worker is started in its place.

Without peer access all slabs lie in host memory instead: files that every worker has, mapped and registered, so that
kernels find them behind `bases` like any other memory. Slower, otherwise the same. That is what a worker starts with if
its file has been given a size; one that cannot map some peer says so, and is then told to change over. Its allocation
stays until the end, because a peer may still map it. Without a GPU (kernels interpreted) memory is host memory anyway.

Mapping and unmapping wait for other devices: only while this one is idle.
"""

import ctypes
import os
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from tetrion.engine.messages import PeerSlab
from tetrion.engine.parallel.gpu.cuda_runtime import CudaError, CudaRuntime, device_index_of
from tetrion.engine.parallel.gpu.raw_memory import tensor_at
from tetrion.engine.parallel.gpu.slab import GpuSlabs
from tetrion.engine.parallel.layout import ControlLayout, SlabLayout
from tetrion.engine.parallel.words import AbortWords
from tetrion.engine.transport.segment import SharedSegment


class GpuMemory:
    """One worker's slab, its view of the others', and its abort word."""

    def __init__(
        self,
        layout: SlabLayout,
        device_id: int,
        device: torch.device,
        slab_fds: Sequence[int],
        control_fd: int,
        runtime: CudaRuntime | None = None,
    ) -> None:
        """`device`: the current CUDA device, with its index, or the CPU. `slab_fds`: a file for each slab, owned from
        here on; empty files as long as slabs lie on GPUs. `control_fd`: the control segment. `runtime`: for tests.

        Raises CudaError if the GPU has too little memory.
        """
        assert len(slab_fds) == layout.num_devices, f"{len(slab_fds)} files for {layout.num_devices} slabs"
        self.device_id, self.device = device_id, device
        self._layout, self._slab_fds = layout, tuple(slab_fds)
        self._runtime = CudaRuntime.of_torch() if device.type == "cuda" and runtime is None else runtime
        self._segments: dict[int, SharedSegment] = {}
        self._registered: list[int] = []
        self._opened: dict[int, int] = {}
        self._allocation = 0
        self.slabs = GpuSlabs(layout, device_id, device)
        words = ControlLayout(num_devices=layout.num_devices)
        self._control = SharedSegment.attach(control_fd, words.num_bytes)
        self._aborts = AbortWords(self._control.view, layout.num_devices)
        abort_address = self._device_pointer(self._control) + words.abort_offset(device_id)
        self.abort: Tensor = tensor_at(abort_address, (1,), torch.int32, device)
        """This device's abort word in host memory, as kernels see it; int32 [1]."""
        if self._runtime is None or os.fstat(self._slab_fds[device_id]).st_size:
            self._map_host_memory()
            self._forget_the_past()
        else:
            self._allocation = self._runtime.malloc(layout.num_bytes)
            self.slabs.place(device_id, self._allocation)

    @property
    def description(self) -> PeerSlab:
        """What peers need to map this device's slab."""
        assert self._runtime is not None, "nobody maps a slab that is not on a GPU"
        handle = self._runtime.ipc_handle(self._allocation) if self._allocation else b""
        uuid = str(torch.cuda.get_device_properties(self.device).uuid)
        return PeerSlab(device_id=self.device_id, handle=handle, device_uuid=uuid)

    def map_peers(self, slabs: Sequence[PeerSlab], *, host_memory: bool) -> tuple[tuple[int, ...], str]:
        """Map the slabs of `slabs` (this device's own among them is skipped), or all of them in host memory.

        Returns the devices whose slabs can now be reached, and why others cannot ("" if nothing failed).
        """
        if host_memory:
            self.unmap_peers(tuple(self._opened))
            self._map_host_memory()
            return self.slabs.mapped, ""
        reasons = [self._map_peer(slab) for slab in slabs if slab.device_id != self.device_id]
        return self.slabs.mapped, "; ".join(filter(None, reasons))

    def unmap_peers(self, device_ids: Collection[int]) -> None:
        """Close the mappings of these devices' slabs. What is not mapped, or in host memory, is left as it is."""
        for device in device_ids:
            if address := self._opened.pop(device, 0):
                assert self._runtime is not None
                self.slabs.place(device, 0)
                self._synchronize()
                self._runtime.ipc_close(address)

    def clear_abort(self) -> None:
        self._aborts.clear(self.device_id)

    def pin(self, segment: SharedSegment) -> None:
        """Copies to and from the segment need no host thread from now on."""
        self._device_pointer(segment)

    def close(self) -> None:
        """Give back mappings and memory. Only once nothing runs any more; every view of them is void."""
        self.unmap_peers(tuple(self._opened))
        for device in self.slabs.mapped:
            self.slabs.place(device, 0)
        self._synchronize()
        if self._runtime is not None:
            for address in self._registered:
                self._runtime.host_unregister(address)
            if self._allocation:
                self._runtime.free(self._allocation)
        self._registered, self._allocation = [], 0

    def _map_peer(self, slab: PeerSlab) -> str:
        """ "" or why that slab cannot be mapped."""
        assert self._runtime is not None, "host memory needs no handles"
        self.unmap_peers((slab.device_id,))
        try:
            peer_index = device_index_of(slab.device_uuid)
            if peer_index is None:
                return f"device {slab.device_id} ({slab.device_uuid}) is not visible to device {self.device_id}"
            own_index = self.device.index or 0
            if peer_index != own_index and not self._runtime.can_access_peer(own_index, peer_index):
                return f"device {self.device_id} has no peer access to device {slab.device_id}"
            address = self._runtime.ipc_open(slab.handle)
            self._opened[slab.device_id] = address
            self._runtime.read(address, self._layout.versions_offset)
        except CudaError as error:
            return f"device {self.device_id} cannot map the slab of device {slab.device_id}: {error}"
        self.slabs.place(slab.device_id, address)
        return ""

    def _map_host_memory(self) -> None:
        """All slabs in their files, which must have their full size by now."""
        for device, fd in enumerate(self._slab_fds):
            if device not in self._segments:
                self._segments[device] = segment = SharedSegment.attach(fd, self._layout.num_bytes)
                self.slabs.place(device, self._device_pointer(segment))

    def _forget_the_past(self) -> None:
        """What a worker before this one left in the file: counters and versions."""
        first, stop = self._layout.counters_offset, self._layout.q_offset
        self._segments[self.device_id].view[first:stop] = bytes(stop - first)

    def _device_pointer(self, segment: SharedSegment) -> int:
        """Where kernels find the segment; from now on it is pinned."""
        address = ctypes.addressof(ctypes.c_uint8.from_buffer(segment.view))
        if self._runtime is None:
            return address
        self._registered.append(address)
        return self._runtime.host_register(address, segment.num_bytes)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
