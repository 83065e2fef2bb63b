"""A GPU worker's backend: its own copy of the weights, a slab that peers map, work that is enqueued."""

import torch

from tetrion.engine.messages import MapPeers, PeerSlab, UnmapPeers
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.family import Model
from tetrion.engine.models.gpu_ops import GpuOps
from tetrion.engine.models.memory_budget import memory_budget
from tetrion.engine.models.registry import all_components, load_on_device, needed_components
from tetrion.engine.parallel.exchange import Exchange
from tetrion.engine.parallel.gpu.exchange import GpuExchange, SharedResources
from tetrion.engine.parallel.gpu.memory import GpuMemory
from tetrion.engine.transport.segment import SharedSegment
from tetrion.engine.worker.denoiser import Denoiser
from tetrion.engine.worker.spec import WorkerSpec
from tetrion.engine.worker.work_queue import WorkQueue


class GpuBackend:
    def __init__(self, spec: WorkerSpec, queue: WorkQueue) -> None:
        """Take the slab, map what the engine shares."""
        self.queue, self._spec = queue, spec
        self._memory = GpuMemory(spec.layout, spec.device.device_id, queue.device, spec.slab_fds, spec.control_fd)
        self._slabs = self._memory.slabs
        memory = self._memory
        self._shared = SharedResources(memory.slabs, memory.abort, memory.clear_abort, spec.models, spec.attention)
        self._step = torch.zeros(1, dtype=torch.int32, device=queue.device)
        self._ops = GpuOps(self._step)

    @property
    def slab(self) -> PeerSlab | None:
        return self._memory.description if self.queue.device.type == "cuda" else None

    def load(self, publish: bool) -> list[Model]:
        device, spec = self.queue.device, self._spec
        components, stages = all_components(spec.models, spec.load_format), spec.device.stages
        needed = needed_components(spec.models, components, stages)
        budget = memory_budget(spec.models, needed, spec.layout, stages)
        if device.type == "cuda":
            free_bytes, _ = torch.cuda.mem_get_info(device)
            budget = budget.fitted(free_bytes + budget.slab_bytes, spec.device.name)  # the slab is already taken
        models = load_on_device(spec.models, spec.load_format, components, device, self._slabs.dtype, self._ops, stages)
        for model in models:
            model.codec.whole_pixels = budget.whole_pixels
            if device.type == "cuda" and "decode" in stages:
                model.codec.fuse()
        return models

    def exchange(self, spec: ModelSpec) -> Exchange:
        return GpuExchange(self._shared, spec, self.queue.to_host)

    def denoiser(self, model: Model, exchange: Exchange) -> Denoiser:
        return Denoiser(model, self._ops, exchange, self.queue, self._step, self._slabs.dtype)

    def map_peers(self, command: MapPeers) -> tuple[tuple[int, ...], str]:
        return self._memory.map_peers(command.slabs, host_memory=command.host_memory)

    def unmap_peers(self, command: UnmapPeers) -> tuple[int, ...]:
        self._memory.unmap_peers(command.device_ids)
        return self._slabs.mapped

    def pin(self, segment: SharedSegment) -> None:
        self._memory.pin(segment)

    def reset(self) -> None:
        self._shared.reset()
