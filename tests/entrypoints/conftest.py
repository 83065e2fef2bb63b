"""A test double of the engine: same surface, no workers. It draws a flat colour made from the seed, or noise if it is
told so.

Prompts steer it: one with `fail` ends in GenerationError, with `crash` in a defect, with `slow` it never ends unless
cancelled, with `full` it is refused as overload, with `dear` for its energy budget. The real engine is tested in
`test_*_end_to_end.py`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.engine.specs import make_spec
from tetrion.engine.config import DeviceSpec, EngineConfig, parse_devices
from tetrion.engine.energy.figures import EnergyFigures
from tetrion.engine.energy.sampler import SamplerCost
from tetrion.engine.errors import (
    BudgetUnmeetable,
    CheapestPlan,
    DeadlineUnmeetable,
    EngineOverloaded,
    GenerationError,
    RequestCancelled,
)
from tetrion.engine.families.served import ServedModels
from tetrion.engine.loop.deliveries import DeliveryFigures
from tetrion.engine.loop.recovery import RecoveryFigures
from tetrion.engine.loop.statistics import LoopFigures
from tetrion.engine.loop.tenant_statistics import TenantFigures
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.request import Delivered, ImageRequest, ImageResult, Progress
from tetrion.engine.resolve import decoded, resolve_request
from tetrion.engine.stages import Stage
from tetrion.entrypoints.cli import run

SPEC = make_spec(name="shapes", path="", in_channels=64, pooled_dim=64, num_steps=4)
EDITOR = msgspec.structs.replace(
    SPEC, name="editor", inputs=SPEC.inputs | {"pictures"}, max_pictures=2, reference_sizes=((128, 256), (192, 192))
)
BEGINNER = msgspec.structs.replace(
    SPEC, name="beginner", inputs=SPEC.inputs | {"pictures", "strength", "mask"}, max_pictures=1, strength=0.5
)
"""Models that take pictures, as references or to begin with."""


NO_ENERGY = EnergyFigures(
    source="none",
    reason="the devices are CPU workers",
    active_j=None,
    idle_j=None,
    unattributed_j=None,
    counter_j=None,
    watts={},
)


NO_LOOP = LoopFigures(num_ticks=0, num_commands=0, cpu_s=0.0, device_s=0.0, lost_s=0.0, held_s=0.0)


class FakeStats(msgspec.Struct, frozen=True, kw_only=True):
    num_devices: int
    roles: str = "all"
    unserved: tuple[Stage, ...] = ()
    num_alive: int
    num_queued: int
    num_admitted: int
    energy: EnergyFigures
    metering_cost: SamplerCost = SamplerCost(num_readings=0, cpu_s=0.0, wall_s=0.0)
    meter_age_s: float | None = None
    loop: LoopFigures = NO_LOOP
    recovery: RecoveryFigures = RecoveryFigures()
    delivery: DeliveryFigures = DeliveryFigures()
    tenants: dict[str, TenantFigures] = {}


class FakeHandle:
    def __init__(self, request: ImageRequest) -> None:
        self.request = request
        self.request_id = request.request_id
        self.is_cancelled = False
        self._outcome: asyncio.Future[ImageResult] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run())

    async def result(self) -> ImageResult:
        return await asyncio.shield(self._outcome)

    async def __aiter__(self) -> AsyncIterator[Progress]:
        for step_index in range(1, (self.request.num_steps or 0) + 1):
            await asyncio.sleep(0)
            if self._outcome.done():
                return
            yield Progress(
                request_id=self.request_id,
                state="denoising",
                step_index=step_index,
                num_steps=self.request.num_steps or 0,
                degree=1,
            )

    def cancel(self) -> None:
        if not self._outcome.done():
            self.is_cancelled = True
            self.fail(RequestCancelled(self.request_id))

    def fail(self, error: Exception) -> None:
        if not self._outcome.done():
            self._task.cancel()
            self._outcome.set_exception(error)
            self._outcome.exception()

    def finish(self) -> None:
        """What is slow is drawn."""
        self._task.cancel()
        self._outcome.set_result(draw(self.request))

    async def _run(self) -> None:
        if "slow" in self.request.prompt:
            await asyncio.sleep(3600)
        await asyncio.sleep(0.001)
        if self._outcome.done():
            return
        if "fail" in self.request.prompt:
            self._outcome.set_exception(GenerationError("worker 1 was lost"))
        elif "crash" in self.request.prompt:
            self._outcome.set_exception(KeyError("secret detail"))
        else:
            self._outcome.set_result(draw(self.request))


def draw(request: ImageRequest) -> ImageResult:
    assert request.width and request.height and request.num_steps and request.seed is not None
    colour = (request.seed % 256, request.seed // 256 % 256, 128)
    image = np.full((request.height, request.width, 3), colour, dtype=np.uint8)
    if "noise" in request.prompt:
        image = np.random.default_rng(request.seed).integers(0, 256, image.shape, dtype=np.uint8)
    return ImageResult(
        request_id=request.request_id,
        model=request.model or "",
        image=image,
        prompt=request.prompt,
        width=request.width,
        height=request.height,
        num_steps=request.num_steps,
        seed=request.seed,
        degrees=request.force_degrees or (1, *(2,) * (request.num_steps - 1)),
        num_text_tokens=len(request.prompt.split()),
        latency_s=0.5,
        queue_s=0.1,
        encode_s=0.1,
        denoise_s=0.2,
        decode_s=0.1,
        slo_met=None if request.slo_ms is None else request.slo_ms >= 500,
    )


def models_of(config: EngineConfig) -> ServedModels:
    """One is always called `shapes`; several as the configuration calls them."""
    names = config.models if len(config.models) > 1 else (SPEC.name,)
    specs = {name: msgspec.structs.replace(SPEC, name=name) for name in names}
    return ServedModels(specs=specs, names=config.model_aliases)


class FakeEngine:
    """`start_error` is raised on entering; `handles` are all accepted requests."""

    def __init__(
        self, config: EngineConfig, start_error: Exception | None = None, spec: ModelSpec | None = None
    ) -> None:
        self.config = config
        self.models = models_of(config) if spec is None else ServedModels(specs={spec.name: spec})
        self.devices: tuple[DeviceSpec, ...] = parse_devices(config.devices)
        self.start_error = start_error
        self.is_running = False
        self.num_starts = 0
        self.handles: list[FakeHandle] = []
        self.delivered_ids: list[str] = []
        self.dropped_ids: list[str] = []
        self.delivery = DeliveryFigures()
        self.energy = NO_ENERGY
        self.meter_age_s: float | None = None
        self.loop = NO_LOOP
        self.recovery = RecoveryFigures()
        self.tenants: dict[str, TenantFigures] = {}
        self.num_alive = len(self.devices)
        self.unserved: tuple[Stage, ...] = ()
        self.death: GenerationError | None = None
        self._ended = asyncio.Event()

    @property
    def spec(self) -> ModelSpec:
        return self.models.default

    async def __aenter__(self) -> "FakeEngine":
        if self.start_error is not None:
            raise self.start_error
        self.is_running = True
        self.num_starts += 1
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._end(GenerationError("the engine was stopped"))

    def die(self) -> None:
        """As if a defect had ended the engine's loop."""
        self.death = GenerationError("the engine loop ended: KeyError('secret')")
        self._end(self.death)

    async def ended(self) -> GenerationError | None:
        await self._ended.wait()
        return self.death

    def _end(self, reason: GenerationError) -> None:
        for handle in self.handles:
            handle.fail(reason)
        self.is_running = False
        self._ended.set()

    def check(self, request: ImageRequest) -> ImageRequest:
        return resolve_request(request, self.models, len(self.devices)).asked

    async def prepared(self, request: ImageRequest) -> ImageRequest:
        return decoded(request, self.models, len(self.devices))

    def submit(self, request: ImageRequest) -> FakeHandle:
        if not self.is_running:
            raise GenerationError("the engine is not running")
        resolved = resolve_request(request, self.models, len(self.devices)).asked
        if "full" in resolved.prompt:
            raise EngineOverloaded("4096 requests are queued")
        if "hopeless" in resolved.prompt:
            raise DeadlineUnmeetable(slo_ms=resolved.slo_ms or 0.0, earliest_slo_ms=1234.0)
        if "dear" in resolved.prompt:
            raise BudgetUnmeetable(
                resolved.energy.budget_j or 0.0, CheapestPlan(joules=9, seconds=2, degrees=(2, 1, 1))
            )
        resolved = msgspec.structs.replace(resolved, request_id=f"r{len(self.handles)}")
        self.handles.append(FakeHandle(resolved))
        return self.handles[-1]

    def stats(self) -> FakeStats:
        if self.death is not None:
            raise self.death
        return FakeStats(
            num_devices=len(self.devices),
            unserved=self.unserved,
            num_alive=self.num_alive,
            num_queued=0,
            num_admitted=0,
            energy=self.energy,
            meter_age_s=self.meter_age_s,
            loop=self.loop,
            recovery=self.recovery,
            delivery=self.delivery,
            tenants=self.tenants,
        )

    def delivered(self, request_id: str, took_s: float) -> Delivered:
        """After no time at all."""
        assert took_s > 0
        self.delivered_ids.append(request_id)
        result = draw(self.handles[int(request_id.removeprefix("r"))].request)
        return Delivered(
            request_id=request_id, tenant="", latency_s=result.latency_s, deliver_s=0.0, slo_met=result.slo_met
        )

    def not_delivered(self, request_id: str) -> None:
        self.dropped_ids.append(request_id)


class FakeFactory:
    """Makes fake engines and remembers them."""

    def __init__(self) -> None:
        self.engines: list[FakeEngine] = []
        self.start_error: Exception | None = None
        self.spec: ModelSpec | None = None

    def __call__(self, config: EngineConfig) -> Any:
        self.engines.append(FakeEngine(config, self.start_error, self.spec))
        return self.engines[-1]

    @property
    def last(self) -> FakeEngine:
        return self.engines[-1]


@pytest.fixture
def factory() -> FakeFactory:
    return FakeFactory()


@pytest.fixture
def tetrion(factory: FakeFactory) -> Callable[..., int]:
    """The command line on fake engines: arguments in, exit code out."""

    def command(*arguments: object) -> int:
        return run([str(argument) for argument in arguments], factory)

    return command
