"""A trace through the real `EngineLoop` in virtual time: what `tetrion bench slo --simulate` runs for each point.

The loop, its admission, its cost model and the policies are those of the server; only the executor is simulated.
Arrivals happen at their times whatever the state of the system (open loop).
"""

import asyncio
import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from tetrion.engine.config import EngineConfig, PlannerConfig
from tetrion.engine.errors import EngineEnded, EngineOverloaded
from tetrion.engine.executors.simulated import Disturbance, SimulatedExecutor
from tetrion.engine.loop.loop import EngineLoop
from tetrion.engine.messages import Command
from tetrion.engine.params import Params
from tetrion.engine.planning.cost.correction import CostModels
from tetrion.engine.planning.cost.profile import Profile
from tetrion.engine.planning.cost.tables import CostTables
from tetrion.engine.planning.policies.registry import get_planner, with_options
from tetrion.engine.request import Failure, ImageRequest, ImageResult, Output, ResolvedRequest
from tetrion.engine.roles import ALL, Stages, parse_roles
from tetrion.engine.shape import StepShape
from tetrion.entrypoints.bench.outcomes import Chunk, Mode, Run
from tetrion.entrypoints.bench.recording import Recorder
from tetrion.entrypoints.bench.workloads import TraceRequest

MAX_INFLIGHT = 4096
MAX_QUEUED = 100_000
MAX_DEVICES = 1024
PIXELS_PER_ROW, TEXT_ROWS = 16, 512
"""As FLUX.1 has them; nothing in a simulation depends on them."""


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """Device `device_id` dies at `time_s`."""

    time_s: float
    device_id: int


class SimulatedSystem(msgspec.Struct, frozen=True, kw_only=True):
    """What `tetrion bench slo` runs traces on in virtual time. `noise`, `bias`, `step_overhead_s`, `regroup_s`: see
    `Disturbance`; `losses`: devices that die in every run. `planner`: its settings, with the options of each policy by
    its name in `options`; `max_inflight`: see `simulate`. `roles`: of the devices, as the engine's option."""

    tables: CostTables
    num_devices: int
    noise: float = 0.0
    bias: float = 0.0
    step_overhead_s: float = 0.0
    regroup_s: float = 0.0
    losses: tuple[Loss, ...] = ()
    planner: PlannerConfig = PlannerConfig()
    options: Mapping[str, Mapping[str, object]] = {}
    max_inflight: int = MAX_INFLIGHT
    roles: str = ALL
    mode: Mode = "sim"

    def check(self) -> None:
        """Raises ValueError, naming the field, for what would stop `run`."""
        if not 1 <= self.num_devices <= MAX_DEVICES:
            raise ValueError(f"devices: must be from 1 to {MAX_DEVICES}, got {self.num_devices}")
        for loss in self.losses:
            if not 0 <= loss.device_id < self.num_devices:
                raise ValueError(f"lose: device must be from 0 to {self.num_devices - 1}, got {loss.device_id}")
        if not 1 <= self.max_inflight <= MAX_INFLIGHT:
            raise ValueError(f"max_inflight: must be from 1 to {MAX_INFLIGHT}, got {self.max_inflight}")
        parse_roles(self.roles, self.num_devices)
        self._disturbance(seed=0)

    def run(self, trace: Sequence[TraceRequest], policy: str, seed: int) -> tuple[Run, tuple[Chunk, ...]]:
        """One trace under one policy; `seed` is that of the noise."""
        recorder = Recorder()
        run = simulate(
            trace,
            profile=self.tables.profiles,
            policy=policy,
            num_devices=self.num_devices,
            duration=self._disturbance(seed),
            losses=self.losses,
            max_inflight=self.max_inflight,
            planner_config=msgspec.structs.replace(self.planner, options=self.options.get(policy, {})),
            recorder=recorder,
            roles=self.roles,
        )
        return run, tuple(recorder.chunks)

    def _disturbance(self, seed: int) -> Disturbance:
        return Disturbance(
            seed=seed,
            noise=self.noise,
            bias=self.bias,
            step_overhead_s=self.step_overhead_s,
            regroup_s=self.regroup_s,
        )


def simulate(
    trace: Sequence[TraceRequest],
    *,
    profile: Profile | Mapping[str, Profile],
    policy: str,
    num_devices: int,
    duration: Callable[[Command, float], float] = lambda _, seconds: seconds,
    losses: Sequence[Loss] = (),
    max_inflight: int = MAX_INFLIGHT,
    planner_config: PlannerConfig | None = None,
    recorder: Recorder | None = None,
    roles: str = ALL,
) -> Run:
    """Run `trace` (in order of arrival) to its end. Deterministic but for `decision_s`.

    `profile`: the model's cost table; of several models by the name that requests have in `TraceRequest.model`.
    `duration(command, seconds)` may change what a command costs (see `Disturbance`). `max_inflight`: requests that the
    policy sees at once (a server's default is 64; here nearly all, so that policies are compared and not admission).
    `planner_config`: settings besides the policy; what its admission refuses is not run. `recorder` is given every
    command.
    `roles`: as the engine's option.
    Raises ValueError for an unknown policy, too few devices, too long a trace, a model without a table or a loss of a
    device that is not there.
    """
    if num_devices < 1:
        raise ValueError(f"devices: must be at least 1, got {num_devices}")
    if not 1 <= len(trace) <= MAX_QUEUED:
        raise ValueError(f"trace: must have from 1 to {MAX_QUEUED} requests, got {len(trace)}")
    for loss in losses:
        if not 0 <= loss.device_id < num_devices:
            raise ValueError(f"losses: device must be from 0 to {num_devices - 1}, got {loss.device_id}")
    config = EngineConfig(
        max_inflight=max_inflight,
        max_queued=MAX_QUEUED,
        planner=with_options(msgspec.structs.replace(planner_config or PlannerConfig(), policy=policy)),
    )
    stages = parse_roles(roles, num_devices)
    costs = CostTables(profiles={"": profile} if isinstance(profile, Profile) else dict(profile))
    if unknown := {request.model for request in trace} - set(costs.profiles):
        raise ValueError(f"trace: model: {min(unknown)!r} has no cost table")
    return _Simulation(trace, costs, num_devices, duration, losses, config, recorder or Recorder(), stages).to_end()


class _Simulation:
    def __init__(
        self,
        trace: Sequence[TraceRequest],
        costs: CostTables,
        num_devices: int,
        duration: Callable[[Command, float], float],
        losses: Sequence[Loss],
        config: EngineConfig,
        recorder: Recorder,
        stages: Sequence[Stages],
    ) -> None:
        self.trace = trace
        self.finished: list[tuple[float | None, tuple[int, ...]]] = [(None, ())] * len(trace)
        self.refused: set[int] = set()
        self.num_alive = len(trace)
        self.recorder = recorder
        self.executor = SimulatedExecutor(costs, num_devices, duration, stages=stages)
        self.loop = EngineLoop(
            executor=recorder.wrap_executor(self.executor),
            planner=recorder.wrap_planner(get_planner(config.planner.policy)),
            cost_models=CostModels(costs.profiles),
            config=config,
            outputs=self._receive,
        )
        for number, request in enumerate(trace):
            self.executor.at(request.arrival_s, lambda number=number: self._arrive(number))  # type: ignore[misc]
        for loss in losses:
            self.executor.at(loss.time_s, lambda loss=loss: self._lose(loss.device_id))  # type: ignore[misc]

    def to_end(self) -> Run:
        with _without_collector(), contextlib.suppress(EngineEnded):  # without workers the rest of the trace fails
            asyncio.run(self.loop.run())
        return self.recorder.run(
            self.trace,
            self.finished,
            num_devices=len(self.executor.device_ids),
            end_s=self.executor.now_s(),
            loop=self.loop.statistics.figures(self.executor.now_s()),
            refused=self.refused,
        )

    def _arrive(self, number: int) -> None:
        if not self.executor.alive:
            return self._ended()
        try:
            self.loop.submit(_resolved(self.trace[number], number))
        except EngineOverloaded:
            self.refused.add(number)
            self._ended()

    def _lose(self, device_id: int) -> None:
        if device_id in self.executor.alive:
            self.executor.lose(device_id)

    def _receive(self, output: Output) -> None:
        if isinstance(output, ImageResult):
            self.finished[int(output.request_id)] = (self.executor.now_s(), output.degrees)
            self._ended()
        elif isinstance(output, Failure):
            self._ended()

    def _ended(self) -> None:
        self.num_alive -= 1
        if not self.num_alive:
            self.loop.stop()


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """A run makes no reference cycles, and keeps so much that looking for some takes a tenth of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def prompt_of(number: int, run: int = 0) -> str:
    """A prompt of its own for every request of every run, so that no cache of prompts saves an encode."""
    return f"picture {number} of run {run}: a red circle left of a large blue star"


def as_image_request(request: TraceRequest, number: int, run: int = 0) -> ImageRequest:
    """Request `number` of a trace as an engine takes it, in its `run`-th run."""
    return ImageRequest(
        prompt=prompt_of(number, run),
        width=request.width,
        height=request.height,
        num_steps=request.num_steps,
        guidance=0.0,
        seed=number,
        slo_ms=None if request.slo_s is None else request.slo_s * 1e3,
        weight=request.weight,
        tenant=request.tenant,
        request_id=f"{number:06d}",
    )


def _resolved(request: TraceRequest, number: int) -> ResolvedRequest:
    """Request `number` of a trace for simulated devices, which draw any size in any number of branches."""
    rows = (request.width // PIXELS_PER_ROW) * (request.height // PIXELS_PER_ROW)
    text = (TEXT_ROWS,) * request.num_branches
    params = Params(
        model=request.model,
        shape=StepShape(width=request.width, height=request.height, image=rows, text=text),
        num_steps=request.num_steps,
        guidance=0.0,
        seed=number,
    )
    return ResolvedRequest(asked=as_image_request(request, number), params=params)
