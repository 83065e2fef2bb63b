"""The executor that drives real worker processes: the engine's clock, commands, events and pictures."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from tetrion.engine.config import DeviceSpec, EngineConfig
from tetrion.engine.errors import GenerationError
from tetrion.engine.executors.base import Happening, PictureReady, WorkerLost
from tetrion.engine.executors.fleet.pool import WorkerPool
from tetrion.engine.executors.fleet.segments import Segments
from tetrion.engine.hardware.standard_streams import hold_standard_descriptors
from tetrion.engine.messages import Command, Decode
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.params import Params
from tetrion.engine.request import Receipt
from tetrion.engine.roles import Stages
from tetrion.engine.transport.available_memory import available_memory_bytes

WORKER_BYTES = 400_000_000
"""What a worker process takes beside the shared memory: its libraries, which forked ones share, and what it computes
with."""

FIRST_TIME_S = {"cpu": 0.0, "cuda": 60.0}
"""A GPU worker compiles kernels and records graphs for a shape that is new to it."""


class ProcessExecutor:
    """Drives one persistent process per device. Create it, `await start()`, use it, `await close()`."""

    def __init__(self, devices: tuple[DeviceSpec, ...], specs: Sequence[ModelSpec], config: EngineConfig) -> None:
        self.devices = devices
        self.device_ids = tuple(device.device_id for device in devices)
        self.stages: Mapping[int, Stages] = {device.device_id: device.stages for device in devices}
        self._specs = specs
        self.first_time_s = FIRST_TIME_S[devices[0].kind]
        self._config = config
        self._wake = asyncio.Event()
        self._is_closed = False
        self._segments: Segments | None = None
        self._pool: WorkerPool | None = None
        self._copies: set[asyncio.Task[None]] = set()
        self._pictures: list[PictureReady] = []

    # Life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Create the shared memory, start the workers, load the models.

        Raises SharedMemoryError if memory does not suffice, CheckpointError if a worker finds that a model's files are
        at fault, GenerationError if one fails to come up in time.
        """
        assert not self._is_closed
        self._check_memory()
        hold_standard_descriptors()
        self._segments = Segments(self.devices, self._specs, self._config)
        try:
            self._pool = WorkerPool(self.devices, self._segments, self._config.start_timeout_s, self._wake.set)
            self._pool.start()
            await self._all_ready(self._pool)
        except BaseException:
            await self.close()
            raise

    async def _all_ready(self, pool: WorkerPool) -> None:
        while True:
            if self._is_closed:
                raise GenerationError("the engine was closed while it started")
            for event in pool.poll():
                if isinstance(event, WorkerLost):
                    raise GenerationError(f"worker {event.device_id} ended while starting: {event.reason}")
            if pool.alive == frozenset(self.device_ids):
                return
            await self.wait(None)

    def _check_memory(self) -> None:
        """Refuse what would only be killed later, half started."""
        available, wanted = available_memory_bytes(), WORKER_BYTES * len(self.devices)
        if available is not None and wanted > available:
            raise GenerationError(
                f"devices: {len(self.devices)} workers take about {wanted:,} bytes of memory,"
                f" {available:,} are available"
            )

    async def close(self) -> None:
        """Shut the workers down (terminate, then kill, those that do not go) and give back all shared memory. Whoever
        waits for them to start gets GenerationError. May be called again, also meanwhile."""
        self._is_closed = True
        self.wake()
        if self._pool is not None:
            await self._pool.close()
        if self._copies:
            await asyncio.wait(self._copies)
        segments, self._segments = self._segments, None
        if segments is not None:
            segments.close()

    # Executor ----------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> frozenset[int]:
        return frozenset() if self._pool is None else self._pool.alive

    @property
    def occupied(self) -> frozenset[int]:
        return frozenset() if self._pool is None else self._pool.occupied

    def now_s(self) -> float:
        return time.monotonic()

    def submit(self, command: Command, members: tuple[int, ...]) -> bool:
        return self._started_pool.submit(command, members)

    def poll(self) -> list[Happening]:
        """Raises GenerationError once it is closed."""
        if self._is_closed:
            raise GenerationError("the engine was closed")
        pictures, self._pictures = self._pictures, []
        return [*self._started_pool.poll(), *pictures]

    async def wait(self, until_s: float | None) -> None:
        timeout_s = None if until_s is None else max(0.0, until_s - self.now_s())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        self._wake.clear()

    def wake(self) -> None:
        self._wake.set()

    def abort(self, device_ids: Collection[int]) -> None:
        for device_id in device_ids:
            self._mapped.aborts.set(device_id)

    def kill(self, device_id: int, reason: str) -> None:
        self._started_pool.kill(device_id, reason)

    def revive(self) -> None:
        self._started_pool.revive()

    # Requests' states in host memory -----------------------------------------------------------------------------

    def read_saved(self, params: Params, slot: int, chunk_index: int) -> npt.NDArray[np.float32]:
        return self._mapped.saved_state(params, slot, chunk_index).copy()

    def write_saved(self, params: Params, slot: int, chunk_index: int, state: npt.NDArray[np.float32]) -> None:
        self._mapped.saved_state(params, slot, chunk_index)[...] = state

    # Pictures ----------------------------------------------------------------------------------------------------

    def put_pictures(self, pictures: Sequence[npt.NDArray[np.uint8]]) -> int | None:
        inputs = self._mapped.inputs
        input_slot = inputs.acquire()
        if input_slot is not None:
            try:
                inputs.write_all(input_slot, pictures)
            except BaseException:
                inputs.release(input_slot)
                raise
        return input_slot

    def release_input_slot(self, input_slot: int) -> None:
        self._mapped.inputs.release(input_slot)

    def acquire_image_slot(self) -> int | None:
        return self._mapped.images.acquire()

    def release_image_slot(self, image_slot: int) -> None:
        self._mapped.images.release(image_slot)

    def take_image(self, decode: Decode, receipt: Callable[[], Receipt]) -> None:
        copy = asyncio.create_task(self._take_image(decode, receipt))
        self._copies.add(copy)
        copy.add_done_callback(self._copies.discard)

    async def _take_image(self, decode: Decode, receipt: Callable[[], Receipt]) -> None:
        """In another thread: copying a large picture takes milliseconds, in which a device would wait for the loop, and
        a receipt may have to wait for the account, which is booking a reading."""
        width, height = decode.params.shape.size

        def take() -> tuple[npt.NDArray[np.uint8], Receipt]:
            return self._mapped.images.read(decode.image_slot, (height, width, 3)), receipt()

        command_id = decode.command_id
        try:
            image, cost = await asyncio.to_thread(take)
            ready = PictureReady(command_id=command_id, ready_s=self.now_s(), image=image, receipt=cost)
        except Exception as error:
            ready = PictureReady(command_id=command_id, ready_s=self.now_s(), error=error)
        self.release_image_slot(decode.image_slot)
        self._pictures.append(ready)
        self.wake()

    def read_latents(self, image_slot: int, num_tokens: int, num_channels: int) -> npt.NDArray[np.float32]:
        """A copy of what `CopyLatents` left: fp32 [num_tokens, num_channels]."""
        return self._mapped.images.read(image_slot, (num_tokens, num_channels), np.float32)

    # Facts -------------------------------------------------------------------------------------------------------

    @property
    def weights_bytes(self) -> int:
        return 0 if self._pool is None else self._pool.weights_bytes

    @property
    def device_uuids(self) -> dict[int, str]:
        """UUID of the GPU of each GPU worker, by device id; empty on CPUs."""
        return {} if self._pool is None else self._pool.device_uuids

    @property
    def exchange(self) -> str:
        """Where members' slabs lie: `peer memory` of GPUs that reach each other, or `host memory`."""
        return "host memory" if self._mapped.slabs_in_host_memory else "peer memory"

    def worker_pids(self) -> dict[int, int]:
        """Process id of each worker that is alive, by device id."""
        return {} if self._pool is None else self._pool.pids()

    @property
    def _started_pool(self) -> WorkerPool:
        assert self._pool is not None, "the executor was not started"
        return self._pool

    @property
    def _mapped(self) -> Segments:
        if self._segments is None:
            raise GenerationError("the engine is not running")
        return self._segments
