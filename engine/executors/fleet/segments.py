"""All memory that the engine shares with its workers, and what a worker is told of it. Owned for the engine's life.

It outlasts every worker: one that is started again maps the same segments. Starts no process and sends no message.
"""

import contextlib
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tetrion.engine.config import DeviceSpec, EngineConfig, threads_per_worker
from tetrion.engine.executors.fleet.forks import abandon_in_children, no_fork
from tetrion.engine.executors.fleet.room import check_room_on_cpu, check_room_on_gpus
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.parallel.layout import ControlLayout, slab_layout
from tetrion.engine.parallel.saved_states import SavedStates
from tetrion.engine.parallel.words import AbortWords
from tetrion.engine.params import Params
from tetrion.engine.transport.available_memory import available_memory_bytes
from tetrion.engine.transport.channel import ChannelSpec
from tetrion.engine.transport.image_slab import ImageSlab
from tetrion.engine.transport.segment import SharedMemoryError, SharedSegment, open_anonymous_file, reserve
from tetrion.engine.worker.spec import WorkerSpec

ITEMSIZE = {"cpu": 4, "cuda": 2}
"""Bytes of one element in a slab (latents excepted): fp32 on CPUs, bf16 on GPUs."""


class Segments:
    """Slabs, control segment, image slab, input slab, saved states, weights file, and the pipe by which workers see the
    engine end.

    The slabs of GPU workers lie on the GPUs, and their files here stay empty unless `slabs_in_host_memory`.
    """

    def __init__(self, devices: tuple[DeviceSpec, ...], specs: Sequence[ModelSpec], config: EngineConfig) -> None:
        """Raises SharedMemoryError if memory does not suffice, ModelTooLarge if weights take it; nothing is left
        then."""
        num, kind = len(devices), devices[0].kind
        self.slabs_in_host_memory = kind == "cpu" or config.peer_access == "never"
        self._models = tuple(specs)
        self._load_format, self._attention = config.load_format, config.attention
        self._num_threads = threads_per_worker(config, num)
        self._layout = slab_layout(specs, num, config.max_inflight, ITEMSIZE[kind])
        if kind == "cpu":
            check_room_on_cpu(specs, num * self._layout.num_bytes)
        else:
            check_room_on_gpus(specs, self._layout.num_bytes, devices)
        with contextlib.ExitStack() as undo:
            self._slab_fds = [_anonymous_file(undo, f"slab-{device.device_id}") for device in devices]
            if self.slabs_in_host_memory:
                self.reserve_slabs()
            self._control = SharedSegment.create("control", ControlLayout(num_devices=num).num_bytes)
            undo.callback(self._control.close)
            self.images = ImageSlab.create(2 * num + 2, max(map(_image_slot_bytes, specs)))
            undo.callback(self.images.close)
            self.inputs = ImageSlab.create(num + 2, max(1, *[spec.max_input_bytes for spec in specs]), name="inputs")
            undo.callback(self.inputs.close)
            self._saved_states = SavedStates.create(self._layout)
            undo.callback(self._saved_states.close)
            self._weights_fd = _anonymous_file(undo, "weights")
            self.aborts = AbortWords(self._control.view, num)
            with no_fork():
                self._life_read_fd, life_write_fd = os.pipe()
                undo.callback(os.close, self._life_read_fd)
                undo.callback(os.close, life_write_fd)
                self._resources = undo.pop_all()
                abandon_in_children(self)

    def reserve_slabs(self) -> None:
        """Give every slab's file its size. Raises SharedMemoryError."""
        wanted, available = len(self._slab_fds) * self._layout.num_bytes, available_memory_bytes()
        if available is not None and wanted > available:
            raise SharedMemoryError("slabs", wanted, available, "checked before reserving")
        try:
            for fd in self._slab_fds:
                reserve(fd, self._layout.num_bytes)
        except OSError as error:
            raise SharedMemoryError("slabs", wanted, available, error.strerror or str(error)) from error
        self.slabs_in_host_memory = True

    def worker_spec(self, device: DeviceSpec, channel: ChannelSpec, worker_life_fd: int) -> WorkerSpec:
        """What the worker of `device` is told. `worker_life_fd`: the write end of its own life pipe."""
        return WorkerSpec(
            device=device,
            num_threads=self._num_threads,
            models=self._models,
            load_format=self._load_format,
            attention=self._attention,
            layout=self._layout,
            channel=channel,
            slab_fds=tuple(self._slab_fds),
            control_fd=self._control.fd,
            saved_states_fd=self._saved_states.segment.fd,
            image_slab_fd=self.images.fd,
            num_image_slots=self.images.num_slots,
            image_slot_bytes=self.images.slot_bytes,
            input_slab_fd=self.inputs.fd,
            num_input_slots=self.inputs.num_slots,
            input_slot_bytes=self.inputs.slot_bytes,
            weights_fd=self._weights_fd,
            engine_life_fd=self._life_read_fd,
            worker_life_fd=worker_life_fd,
        )

    def saved_state(self, params: Params, slot: int, chunk_index: int) -> npt.NDArray[np.float32]:
        """Where a request's state is saved that has so many chunks behind it: [image rows, width]."""
        width = self._layout.slots[params.model].latents.field.width
        return self._saved_states.view(slot, chunk_index, (params.shape.image, width))

    def close(self) -> None:
        """Give everything back, once; workers that still run see the engine end."""
        if hasattr(self, "aborts"):
            del self.aborts  # its words keep the segment mapped
        self._resources.close()

    def abandon(self) -> None:
        """In a forked child: it keeps neither memory nor the pipe by which workers see the engine end."""
        self.close()


def _image_slot_bytes(spec: ModelSpec) -> int:
    """For the largest picture, or its latents."""
    return max(3 * spec.sizes.max**2, 4 * spec.max_rows("image") * spec.latents.width)


def _anonymous_file(undo: contextlib.ExitStack, name: str) -> int:
    fd = open_anonymous_file(name)
    undo.callback(os.close, fd)
    return fd


def inherited(spec: WorkerSpec) -> tuple[int, ...]:
    """All descriptors that a worker is handed."""
    lives = (spec.engine_life_fd, spec.worker_life_fd)
    slabs = (*spec.slab_fds, spec.control_fd, spec.saved_states_fd, spec.image_slab_fd, spec.input_slab_fd)
    return (*spec.channel.fds, *slabs, spec.weights_fd, *lives)
