"""A CPU worker's backend: weights shared by all workers, slabs in shared memory, work done when it is enqueued."""

from collections.abc import Callable

import torch

from tetrion.engine.messages import Event, GroupCommand, MapPeers, UnmapPeers
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.family import Model
from tetrion.engine.models.ops import ReferenceOps
from tetrion.engine.models.registry import load_shared
from tetrion.engine.parallel.cpu.barrier import PairwiseBarrier
from tetrion.engine.parallel.cpu.exchange import CpuExchange
from tetrion.engine.parallel.cpu.slab import SharedSlabs
from tetrion.engine.parallel.exchange import Exchange
from tetrion.engine.parallel.layout import ControlLayout
from tetrion.engine.transport.segment import SharedSegment
from tetrion.engine.worker.denoiser import Denoiser
from tetrion.engine.worker.runner import Finish
from tetrion.engine.worker.spec import WorkerSpec
from tetrion.engine.worker.work_queue import ImmediateQueue


class CpuBackend:
    slab = None

    def __init__(self, spec: WorkerSpec) -> None:
        """Map everything that the engine shares."""
        self.queue = ImmediateQueue()
        self._spec = spec
        layout, me = spec.layout, spec.device.device_id
        slabs = [SharedSegment.attach(fd, layout.num_bytes).view for fd in spec.slab_fds]
        control = SharedSegment.attach(spec.control_fd, ControlLayout(num_devices=layout.num_devices).num_bytes).view
        self._slabs = SharedSlabs(layout, me, slabs)
        self._barrier = PairwiseBarrier(layout, me, slabs, control)
        self._step = torch.zeros(1, dtype=torch.int32)
        self._ops = ReferenceOps(self._step)

    def load(self, publish: bool) -> list[Model]:
        spec = self._spec
        return load_shared(spec.models, spec.weights_fd, publish, spec.load_format, self._ops, spec.device.stages)

    def exchange(self, spec: ModelSpec) -> Exchange:
        return CpuExchange(self._slabs, self._barrier, spec)

    def denoiser(self, model: Model, exchange: Exchange) -> Denoiser:
        return Denoiser(model, self._ops, exchange, self.queue, self._step, self._slabs.dtype)

    def map_peers(self, command: MapPeers) -> tuple[tuple[int, ...], str]:
        raise AssertionError("CPU workers have all slabs mapped from the start")

    def unmap_peers(self, command: UnmapPeers) -> tuple[int, ...]:
        raise AssertionError("CPU workers keep all slabs mapped")

    def pin(self, segment: SharedSegment) -> None:
        """Nothing is copied behind anyone's back."""

    def reset(self) -> None:
        self._barrier.reset()


class AtOnce:
    """Answers of commands whose work is done when it is enqueued."""

    def __init__(self, send: Callable[[Event], None]) -> None:
        self._send = send

    def add(self, command: GroupCommand, finish: Finish) -> None:
        event: Event = finish()
        self._send(event)
