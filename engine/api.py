"""The embedded engine: `AsyncEngine`. Its synchronous twin is in `sync_engine.py`.

async with AsyncEngine() as engine:
    result = await engine.generate("a red circle above a blue square")
    result.image                                   # numpy uint8 RGB [height, width, 3]
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol, Self

import msgspec

from tetrion.engine.config import DeviceSpec, EngineConfig, checked, parse_devices
from tetrion.engine.energy.early_check import MeteringError, check_metering
from tetrion.engine.energy.figures import EnergyFigures
from tetrion.engine.energy.metering import Metering
from tetrion.engine.energy.meters.base import EnergyMeter
from tetrion.engine.energy.sampler import SamplerCost
from tetrion.engine.errors import EngineEnded, GenerationError, RequestError
from tetrion.engine.executors.base import Executor
from tetrion.engine.executors.fleet.room import with_roles
from tetrion.engine.executors.processes import ProcessExecutor
from tetrion.engine.families.served import ServedModels, read_served_models
from tetrion.engine.loop.deliveries import DeliveryFigures
from tetrion.engine.loop.loop import EngineLoop
from tetrion.engine.loop.recovery import RecoveryFigures
from tetrion.engine.loop.statistics import LoopFigures
from tetrion.engine.loop.tenant_statistics import TenantFigures
from tetrion.engine.measure.calibration import calibrate
from tetrion.engine.measure.profile_files import chosen_profiles
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.planning.cost.correction import CostModels
from tetrion.engine.planning.cost.profile import Profile
from tetrion.engine.planning.cost.tables import CostTables
from tetrion.engine.planning.energy_admission import check_default, check_early
from tetrion.engine.planning.policies.registry import get_planner, with_options
from tetrion.engine.planning.snapshot import Planner
from tetrion.engine.request import Delivered, Failure, ImageRequest, ImageResult, Output, Progress
from tetrion.engine.resolve import decoded, resolve_request
from tetrion.engine.roles import ALL, Stages, roles_text, unserved

logger = logging.getLogger(__name__)


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """A moment's counts. `roles`: which stages each device serves; `unserved`: stages that wait for a device to come
    back. By model: `profiles`, the cost tables in use; `inexact_degrees`, those that failed the
    start-up self-test. `tenants`: what each has had (tenant_statistics.py). `loop`: what the loop has cost since the
    start; `recovery`: what was lost and started again; `delivery`: pictures handed on, and deadlines by then; `energy`:
    sums of joules; `metering_cost`: what sampling costs; `meter_age_s`: since it last told joules, None if it is not
    read. `policy`: the one in use, which is not the configured one once that has failed again and again."""

    num_devices: int
    roles: str = ALL
    unserved: Stages = ()
    num_alive: int
    num_queued: int
    num_admitted: int
    weights_bytes: int
    inexact_degrees: dict[str, tuple[int, ...]]
    profiles: dict[str, Profile]
    loop: LoopFigures
    recovery: RecoveryFigures
    delivery: DeliveryFigures
    energy: EnergyFigures
    metering_cost: SamplerCost
    meter_age_s: float | None
    policy: str
    tenants: dict[str, TenantFigures] = {}


class Instrument(Protocol):
    """Watches an engine from inside (a recorder, a benchmark): it may put itself around the executor and the policy
    that the loop is given."""

    def wrap_executor(self, executor: Executor) -> Executor: ...

    def wrap_planner(self, planner: Planner) -> Planner: ...


def check_process(owner: int | None) -> None:
    """Raises GenerationError in a process that was forked from the `owner` of an engine: its workers answer one."""
    if owner not in (None, os.getpid()):
        raise GenerationError(
            f"the engine belongs to process {owner}, from which this one was forked; make another one here"
        )


class RequestHandle:
    """One submitted request. Await `result()`, iterate over it for `Progress`, or `cancel()` it."""

    def __init__(self, request: ImageRequest, loop: EngineLoop) -> None:
        self.request = request
        self._loop = loop
        self._result: asyncio.Future[ImageResult] = asyncio.get_running_loop().create_future()
        self._updates: asyncio.Queue[Progress | None] = asyncio.Queue()
        self.is_given_up = False
        """Before it had ended."""

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def done(self) -> bool:
        return self._result.done()

    async def result(self) -> ImageResult:
        """The picture. Raises GenerationError, or RequestCancelled."""
        return await asyncio.shield(self._result)

    async def __aiter__(self) -> AsyncIterator[Progress]:
        """Progress from now on, until the request has ended (one iterator at a time)."""
        while not (self.done and self._updates.empty()):
            update = await self._updates.get()
            if update is None:
                return
            yield update

    def cancel(self) -> None:
        """Give the request up; takes effect at its next chunk boundary."""
        self.is_given_up = self.is_given_up or not self.done
        self._loop.cancel(self.request_id)

    def receive(self, output: Output) -> None:
        """Called by the engine with everything it says of this request."""
        match output:
            case Progress():
                self._updates.put_nowait(output)
                return
            case ImageResult() if not self.done:
                self._result.set_result(output)
            case Failure() if not self.done:
                self._result.set_exception(output.error)
                self._result.exception()  # retrieved: nobody need await a request that was given up
        self._updates.put_nowait(None)


class AsyncEngine:
    """An engine on the running asyncio loop. An async context manager; `start` and `close` by hand do as well."""

    def __init__(
        self,
        config: EngineConfig | None = None,
        instrument: Instrument | None = None,
        g_per_kwh: Callable[[], float | None] | None = None,
    ) -> None:
        """Checks configuration and model folders; starts nothing. Raises ValueError (CheckpointError for a model).

        `g_per_kwh`: grams of CO₂e per kWh now (None: not known), for receipts, in place of `MeteringConfig.carbon`. It
        is asked at the end of each request, in other threads, and must answer at once."""
        self._instrument, self._g_per_kwh = instrument, g_per_kwh
        self.config = checked(config or EngineConfig())
        devices = parse_devices(self.config.devices)
        check_metering(self.config.metering, has_gpus=devices[0].kind == "cuda")
        self.models: ServedModels = read_served_models(self.config)
        self.devices: tuple[DeviceSpec, ...] = with_roles(devices, tuple(self.models.specs.values()), self.config)
        self._num_denoising = sum("denoise" in device.stages for device in self.devices)
        self._profiles = chosen_profiles(self.devices, self.models, self.config)
        self._planner = get_planner(self.config.planner.policy)
        are_all_known = self._profiles.keys() == self.models.specs.keys()
        self._early_costs = CostTables(profiles=self._profiles)
        planner = with_options(self.config.planner)
        check_default(self._early_costs if are_all_known else None, self._num_denoising, planner)
        self._handles: dict[str, RequestHandle] = {}
        self._executor: ProcessExecutor | None = None
        self._metering: Metering | None = None
        self._loop: EngineLoop | None = None
        self._is_closed = False
        self._owner: int | None = None
        """The process that has started it."""
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()
        self._death = ""
        """What the loop died of."""
        self._inexact_degrees: dict[str, tuple[int, ...]] = {}

    @property
    def spec(self) -> ModelSpec:
        """Of the model that requests get which name none."""
        return self.models.default

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Start the workers, load the models, measure or read their cost tables.

        A process that does little else spares the loop full garbage collections (15 to 30 ms each) by `gc.freeze()`
        once this has returned, as `tetrion serve` does.

        Raises SharedMemoryError if memory does not suffice, CheckpointError for what only loading shows of a model's
        files, GenerationError if a worker does not come up (or the engine was closed meanwhile, or started before),
        MeteringError if the meter does not know a worker's GPU. Nothing is left running then.
        """
        check_process(self._owner)
        if self._executor is not None or self._is_closed:
            raise GenerationError("the engine was started or closed before; make another one")
        self._owner, self._event_loop = os.getpid(), asyncio.get_running_loop()
        self._executor = ProcessExecutor(self.devices, tuple(self.models.specs.values()), self.config)
        begun_s = time.monotonic()
        await self._executor.start()
        loaded_s = time.monotonic()
        try:
            self._metering = self._open_metering(self._executor)
            calibrations = {
                name: await calibrate(self._executor, spec, self.config, self._profiles.get(name))
                for name, spec in self.models.specs.items()
            }
            took_s = loaded_s - begun_s, time.monotonic() - loaded_s
            logger.info("workers started and weights loaded in %.1f s, measured and warmed up in %.1f s", *took_s)
            await self._metering.start()
            if self._is_closed:
                raise GenerationError("the engine was closed while it started")
        except BaseException:
            await self.close()
            raise
        self._inexact_degrees = {name: measured.inexact_degrees for name, measured in calibrations.items()}
        measured_profiles = {name: measured.profile for name, measured in calibrations.items()}
        self._loop = EngineLoop(
            executor=self._executor if self._instrument is None else self._instrument.wrap_executor(self._executor),
            planner=self._planner if self._instrument is None else self._instrument.wrap_planner(self._planner),
            cost_models=CostModels(measured_profiles | self._profiles),
            config=self.config,
            outputs=self._route,
            energy=self._metering.account,
        )
        self._task = asyncio.create_task(self._loop.run(), name="tetrion-engine-loop")
        self._task.add_done_callback(self._on_loop_end)

    def _open_metering(self, executor: ProcessExecutor) -> Metering:
        metering, uuids = self.config.metering, executor.device_uuids
        try:
            return Metering(metering, executor.device_ids, uuids, self._g_per_kwh)
        except ValueError as error:
            raise MeteringError(str(error)) from error

    async def close(self) -> None:
        """End the loop (requests still alive fail with GenerationError), the workers and their shared memory. May be
        called again, also meanwhile; what is asked afterwards raises GenerationError. In a process that was forked from
        the engine's own it does nothing."""
        if self._owner not in (None, os.getpid()):
            return
        self._is_closed = True
        if self._loop is not None and self._task is not None:
            self._loop.stop()
            await asyncio.wait([self._task])
        if self._metering is not None:
            self._metering.stop()
        if self._executor is not None:
            await self._executor.close()

    async def ended(self) -> GenerationError | None:
        """Wait until the engine's loop has ended. None: it was closed; otherwise what it died of: a defect, or that it
        had no worker for `EngineConfig.no_worker_timeout_s`."""
        await self._ended.wait()
        return GenerationError(self._death) if self._death else None

    def check(self, request: ImageRequest | str) -> ImageRequest:
        """The request with every default filled in. Raises as `submit` does for what is known by now to be refused;
        may be asked before the start."""
        resolved = resolve_request(request, self.models, self._num_denoising)
        check_early(resolved, self._early_costs, self._num_denoising, with_options(self.config.planner))
        return resolved.asked

    async def prepared(self, request: ImageRequest | str) -> ImageRequest | str:
        """The request with its pictures decoded and resized, which takes milliseconds: by another thread, so that the
        event loop is free. `generate` does so by itself. Raises RequestError."""
        if not isinstance(request, ImageRequest) or not _brings_pictures(request):
            return request
        return await asyncio.to_thread(decoded, request, self.models, self._num_denoising)

    def submit(self, request: ImageRequest | str) -> RequestHandle:
        """Queue a request; a string is a prompt with all defaults. Pictures that are not decoded yet (`prepared`) are
        decoded here.

        Raises RequestError naming the field and what it may be (ModelNotFound), EngineOverloaded if the queue is full
        (DeadlineUnmeetable if the deadline cannot be met and admission is "reject-hopeless"), GenerationError if the
        engine is not running.
        """
        check_process(self._owner)
        if self._loop is None or self._task is None or self._task.done() or self._is_closed:
            raise GenerationError(self._death or "the engine is not running")
        self._check_loop()
        resolved = resolve_request(request, self.models, self._num_denoising)
        request_id = resolved.asked.request_id
        if request_id in self._handles:
            raise RequestError("request_id", f"{request_id!r} is in use")
        self._loop.submit(resolved)
        handle = self._handles[request_id] = RequestHandle(resolved.asked, self._loop)
        return handle

    def _check_loop(self) -> None:
        try:
            is_ours = asyncio.get_running_loop() is self._event_loop
        except RuntimeError:
            is_ours = False
        if not is_ours:
            raise GenerationError("the engine runs on another event loop than the caller; threads can share an Engine")

    async def generate(self, request: ImageRequest | str) -> ImageResult:
        """Draw one picture. Raises as `submit`, and GenerationError. Cancelling the task cancels the request."""
        handle = self.submit(await self.prepared(request))
        try:
            return await handle.result()
        finally:
            if not handle.done:
                handle.cancel()

    def delivered(self, request_id: str, took_s: float) -> Delivered | None:
        """The caller has handed on the last byte of the picture of a request with a `delivery`, which ends it: by now
        its deadline is met or not. `took_s`: what of the time since the picture was ready was the caller's own work,
        which later pictures' deliveries are predicted from. None if there is no such picture."""
        return None if self._loop is None else self._loop.delivered(request_id, took_s)

    def not_delivered(self, request_id: str) -> None:
        """Nobody takes the picture any more. Of requests without one it changes nothing."""
        if self._loop is not None:
            self._loop.deliveries.dropped(request_id)

    def stats(self) -> EngineStats:
        """Raises GenerationError if the engine was not started, or its loop died."""
        check_process(self._owner)
        if self._death or self._loop is None or self._executor is None or self._metering is None:
            raise GenerationError(self._death or "the engine is not running")
        table = self._loop.table
        return EngineStats(
            num_devices=len(self.devices),
            roles=roles_text([device.stages for device in self.devices]),
            unserved=unserved(self._executor.stages, self._executor.alive - set(self._loop.recovery_figures.overdue)),
            num_alive=len(self._executor.alive),
            num_queued=table.num_queued,
            num_admitted=len(table) - table.num_queued,
            weights_bytes=self._executor.weights_bytes,
            inexact_degrees=self._inexact_degrees,
            profiles=self._loop.cost_models.tables.profiles,
            loop=self._loop.statistics.figures(self._executor.now_s()),
            recovery=self._loop.recovery_figures,
            delivery=self._loop.deliveries.figures,
            energy=self._metering.account.figures(),
            metering_cost=self._metering.cost,
            meter_age_s=self._metering.age_s,
            policy=self._loop.policy,
            tenants=self._loop.statistics.tenants.figures(),
        )

    @property
    def meter(self) -> EnergyMeter:
        """The energy meter. Raises GenerationError if the engine was not started."""
        if self._metering is None:
            raise GenerationError("the engine is not running")
        return self._metering.meter

    def worker_pids(self) -> dict[int, int]:
        """Process id of each worker still alive, by device id."""
        return {} if self._executor is None else self._executor.worker_pids()

    def _route(self, output: Output) -> None:
        handle = self._handles.get(output.request_id)
        if handle is not None:
            handle.receive(output)
            if handle.is_given_up and isinstance(output, ImageResult):
                self.not_delivered(output.request_id)
            if handle.done:
                del self._handles[output.request_id]

    def _on_loop_end(self, task: asyncio.Task[None]) -> None:
        """A loop that ended by an error takes its requests with it; none may wait for ever."""
        error = None if task.cancelled() else task.exception()
        if isinstance(error, EngineEnded):
            self._death = str(error)
            logger.error("the engine ended: %s", error)
        elif error is not None:
            logger.error("the engine loop ended", exc_info=error)
            self._death = f"the engine loop ended: {error!r}"
        reason = GenerationError(self._death or "the engine was stopped")
        self._ended.set()
        for request_id, handle in list(self._handles.items()):
            handle.receive(Failure(request_id=request_id, error=reason))
        self._handles.clear()


def _brings_pictures(request: ImageRequest) -> bool:
    """A field that cannot be read is `submit`'s to complain of."""
    try:
        return request.mask is not None or not (isinstance(request.pictures, list | tuple) and not request.pictures)
    except Exception:
        return False
