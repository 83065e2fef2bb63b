"""The executor that drives real worker processes. Owns them and all the memory shared with them."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from tetrion.engine.config import DeviceSpec, EngineConfig, threads_per_worker
from tetrion.engine.executor import WorkerLost
from tetrion.engine.messages import Command, Event, Failed, Loaded, LoadWeights, Shutdown
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.parallel.layout import ControlLayout, slab_layout
from tetrion.engine.parallel.words import AbortWords
from tetrion.engine.request import GenerationError
from tetrion.engine.transport.available_memory import available_memory_bytes
from tetrion.engine.transport.channel import EngineEnd, create_channel, send_to_all
from tetrion.engine.transport.image_slab import ImageSlab
from tetrion.engine.transport.segment import SharedSegment, open_anonymous_file
from tetrion.engine.worker.process import WorkerProcess
from tetrion.engine.worker.spec import WorkerSpec

logger = logging.getLogger(__name__)
WORKER_BYTES = 400_000_000
"""What a worker process takes beside the shared memory: its libraries, mostly."""


class ProcessExecutor:
    """Drives one persistent process per device. Create it, `await start()`, use it, `await close()`."""

    def __init__(self, devices: tuple[DeviceSpec, ...], spec: ModelSpec, config: EngineConfig) -> None:
        self.devices = devices
        self.device_ids = tuple(device.device_id for device in devices)
        self.alive: frozenset[int] = frozenset()
        self.weights_bytes = 0
        self._spec = spec
        self._config = config
        self._workers: dict[int, WorkerProcess] = {}
        self._channels: dict[int, EngineEnd] = {}
        self._lost: dict[int, str] = {}
        self._wake = asyncio.Event()
        self._resources = contextlib.ExitStack()
        self._aborts: AbortWords | None = None
        self._images: ImageSlab | None = None

    # Life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Create the shared memory, start the workers, load the model.

        Raises SharedMemoryError if memory does not suffice, GenerationError if a worker fails to come up in time.
        """
        try:
            self._spawn()
            await self._load()
        except BaseException:
            await self.close()
            raise

    def _spawn(self) -> None:
        spec, num = self._spec, len(self.devices)
        self._check_memory()
        layout = slab_layout(spec, num, self._config.max_inflight)
        slabs = [self._segment(f"slab-{device_id}", layout.num_bytes) for device_id in self.device_ids]
        control = self._segment("control", ControlLayout(num_devices=num).num_bytes)
        self._aborts = AbortWords(control.view, num)
        slot_bytes = max(3 * spec.max_size**2, 4 * spec.max_image_tokens * spec.in_channels)
        self._images = ImageSlab.create(2 * num + 2, slot_bytes)
        self._resources.callback(self._images.close)
        weights_fd = open_anonymous_file("weights")
        self._resources.callback(os.close, weights_fd)
        engine_life_read, engine_life_write = os.pipe()
        self._resources.callback(os.close, engine_life_write)
        num_threads = threads_per_worker(self._config, num)
        for device in self.devices:
            channel = create_channel(f"worker-{device.device_id}")
            self._channels[device.device_id] = channel
            self._resources.callback(channel.close)
            life_read, worker_life_write = os.pipe()
            worker_spec = WorkerSpec(
                device=device,
                num_threads=num_threads,
                model=spec,
                layout=layout,
                channel=channel.spec,
                slab_fds=tuple(slab.fd for slab in slabs),
                control_fd=control.fd,
                image_slab_fd=self._images.fd,
                num_image_slots=self._images.num_slots,
                image_slot_bytes=self._images.slot_bytes,
                weights_fd=weights_fd,
                engine_life_fd=engine_life_read,
                worker_life_fd=worker_life_write,
            )
            self._workers[device.device_id] = WorkerProcess(worker_spec, _inherited(worker_spec), life_read)
            os.close(worker_life_write)
        os.close(engine_life_read)
        self.alive = frozenset(self.device_ids)
        loop = asyncio.get_running_loop()
        for device_id in self.device_ids:
            loop.add_reader(self._workers[device_id].life_fd, self._on_life_pipe, device_id)
            loop.add_reader(self._channels[device_id].events.fileno(), self._wake.set)

    def _check_memory(self) -> None:
        """Refuse what would only be killed later, half started."""
        available, wanted = available_memory_bytes(), WORKER_BYTES * len(self.devices)
        if available is not None and wanted > available:
            raise GenerationError(
                f"devices: {len(self.devices)} workers take about {wanted:,} bytes of memory,"
                f" {available:,} are available"
            )

    def _segment(self, name: str, num_bytes: int) -> SharedSegment:
        segment = SharedSegment.create(name, num_bytes)
        self._resources.callback(segment.close)
        return segment

    async def _load(self) -> None:
        """The first worker publishes the weights; then the others map them."""
        first, *others = self.device_ids
        deadline_s = self.now_s() + self._config.start_timeout_s
        self.submit(LoadWeights(command_id=first, publish=True), (first,))
        await self._await_loaded({first}, deadline_s)
        for device_id in others:
            self.submit(LoadWeights(command_id=device_id, publish=False), (device_id,))
        await self._await_loaded(set(others), deadline_s)

    async def _await_loaded(self, pending: set[int], deadline_s: float) -> None:
        while pending:
            for event in self.poll():
                if isinstance(event, Loaded):
                    self.weights_bytes = max(self.weights_bytes, event.weights_bytes)
                    pending.discard(event.device_id)
                elif isinstance(event, Failed):
                    raise GenerationError(f"worker {event.device_id} could not load the model: {event.message}")
                elif isinstance(event, WorkerLost):
                    raise GenerationError(f"worker {event.device_id} ended while starting: {event.reason}")
            if pending and self.now_s() > deadline_s:
                raise GenerationError(f"workers {sorted(pending)} were not ready within the start timeout")
            if pending:
                await self.wait(deadline_s)

    async def close(self) -> None:
        """Shut the workers down (terminate, then kill, those that do not go) and give back all shared memory."""
        for device_id in self.alive:
            self._try_shutdown(device_id)
        loop = asyncio.get_running_loop()
        for device_id, worker in self._workers.items():
            loop.remove_reader(worker.life_fd)
            loop.remove_reader(self._channels[device_id].events.fileno())
        self.alive = frozenset()
        await asyncio.gather(*(asyncio.to_thread(worker.end) for worker in self._workers.values()))
        self._workers, self._channels = {}, {}
        self._aborts = None
        self._resources.close()

    def _try_shutdown(self, device_id: int) -> None:
        if not self.submit(Shutdown(command_id=0), (device_id,)):
            self._workers[device_id].kill()

    # Executor ----------------------------------------------------------------------------------------------------

    def now_s(self) -> float:
        return time.monotonic()

    def submit(self, command: Command, members: tuple[int, ...]) -> bool:
        return send_to_all([self._channels[member].commands for member in members], command)

    def poll(self) -> list[Event | WorkerLost]:
        events: list[Event | WorkerLost] = []
        for channel in self._channels.values():
            events += channel.events.drain()
        lost, self._lost = self._lost, {}
        events += [WorkerLost(device_id=device_id, reason=reason) for device_id, reason in lost.items()]
        return events

    async def wait(self, until_s: float | None) -> None:
        timeout_s = None if until_s is None else max(0.0, until_s - self.now_s())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        self._wake.clear()

    def wake(self) -> None:
        self._wake.set()

    def abort(self, device_ids: Collection[int]) -> None:
        assert self._aborts is not None
        for device_id in device_ids:
            self._aborts.set(device_id)

    def kill(self, device_id: int, reason: str) -> None:
        if device_id in self.alive:
            logger.error("killing worker %d: %s", device_id, reason)
            self._workers[device_id].kill()

    def _on_life_pipe(self, device_id: int) -> None:
        worker = self._workers[device_id]
        asyncio.get_running_loop().remove_reader(worker.life_fd)
        self.alive -= {device_id}
        self._lost[device_id] = worker.describe_end()
        self._wake.set()

    # Pictures ----------------------------------------------------------------------------------------------------

    def acquire_image_slot(self) -> int | None:
        assert self._images is not None
        return self._images.acquire()

    def release_image_slot(self, image_slot: int) -> None:
        assert self._images is not None
        self._images.release(image_slot)

    def read_image(self, image_slot: int, width: int, height: int) -> Any:
        assert self._images is not None
        return self._images.read(image_slot, (height, width, 3))

    def read_latents(self, image_slot: int, num_tokens: int, num_channels: int) -> npt.NDArray[np.float32]:
        """A copy of what `CopyLatents` left: fp32 [num_tokens, num_channels]."""
        assert self._images is not None
        return self._images.read(image_slot, (num_tokens, num_channels), np.float32)

    def worker_pids(self) -> dict[int, int]:
        """Process id of each worker still alive, by device id."""
        return {device_id: self._workers[device_id].pid for device_id in sorted(self.alive)}


def _inherited(spec: WorkerSpec) -> tuple[int, ...]:
    """All descriptors that a worker is handed."""
    lives = (spec.engine_life_fd, spec.worker_life_fd)
    return (*spec.channel.fds, *spec.slab_fds, spec.control_fd, spec.image_slab_fd, spec.weights_fd, *lives)
