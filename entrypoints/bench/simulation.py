"""A trace through the real `EngineLoop` in virtual time: what `tetrion bench slo --simulate` runs for each point.

The loop, its admission, its cost model and the policies are those of the server; only the executor is simulated.
Arrivals happen at their times whatever the state of the system (open loop).
"""

import asyncio
import time
from collections.abc import Callable, Sequence

import msgspec

from tetrion.engine.config import EngineConfig, PlannerConfig
from tetrion.engine.loop import EngineLoop
from tetrion.engine.messages import Command, Denoise
from tetrion.engine.model_spec import ModelSpec, SchedulerSpec
from tetrion.engine.planning.correction import CostModel
from tetrion.engine.planning.profile import Profile
from tetrion.engine.planning.registry import get_planner
from tetrion.engine.planning.snapshot import Planner, RoundPlan, Snapshot
from tetrion.engine.request import Failure, ImageRequest, ImageResult, Output
from tetrion.engine.simulated import SimulatedExecutor
from tetrion.entrypoints.bench.workloads import TraceRequest

MAX_INFLIGHT = 4096
MAX_QUEUED = 100_000


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """Device `device_id` dies at `time_s`."""

    time_s: float
    device_id: int


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one request of the trace. `finished_s` None: it failed. `gpu_s`: GPU-seconds spent on it, those
    of lost attempts included. `degrees`: of each step."""

    request: TraceRequest
    finished_s: float | None
    gpu_s: float
    degrees: tuple[int, ...]

    @property
    def latency_s(self) -> float | None:
        return None if self.finished_s is None else self.finished_s - self.request.arrival_s

    @property
    def is_met(self) -> bool | None:
        """Whether it finished by its deadline; None without an SLO."""
        if self.request.slo_s is None:
            return None
        latency_s = self.latency_s
        return latency_s is not None and latency_s <= self.request.slo_s


class SimulatedRun(msgspec.Struct, frozen=True, kw_only=True):
    """`outcomes` in the order of the trace; `end_s`: when the last request ended; `decision_s`: wall-clock seconds of
    each call of the planner (the only part that differs between two runs of one seed)."""

    outcomes: tuple[Outcome, ...]
    num_devices: int
    end_s: float
    decision_s: tuple[float, ...]

    @property
    def utilisation(self) -> float:
        """Share of the devices' time that commands took, until the end."""
        return sum(outcome.gpu_s for outcome in self.outcomes) / (self.num_devices * self.end_s)


def simulate(
    trace: Sequence[TraceRequest],
    *,
    profile: Profile,
    policy: str,
    num_devices: int,
    duration: Callable[[Command, float], float] = lambda _, seconds: seconds,
    losses: Sequence[Loss] = (),
    max_inflight: int = MAX_INFLIGHT,
    planner_config: PlannerConfig | None = None,
) -> SimulatedRun:
    """Run `trace` (in order of arrival) to its end. Deterministic but for `decision_s`.

    `duration(command, seconds)` may change what a command costs (see `Disturbance`). `max_inflight`: requests that the
    policy sees at once (a server's default is 64; here nearly all, so that policies are compared and not admission).
    Raises ValueError for an unknown policy, too few devices, too long a trace or a loss of a device that is not there.
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
        planner=msgspec.structs.replace(planner_config or PlannerConfig(), policy=policy),
    )
    return _Run(trace, profile, num_devices, duration, losses, config).to_end()


class _Run:
    def __init__(
        self,
        trace: Sequence[TraceRequest],
        profile: Profile,
        num_devices: int,
        duration: Callable[[Command, float], float],
        losses: Sequence[Loss],
        config: EngineConfig,
    ) -> None:
        self.trace = trace
        self.gpu_s = [0.0] * len(trace)
        self.finished: list[tuple[float | None, tuple[int, ...]]] = [(None, ())] * len(trace)
        self.num_alive = len(trace)
        self.decision_s: list[float] = []
        self.duration = duration
        self.executor = SimulatedExecutor(profile, num_devices, self._spend)
        self.loop = EngineLoop(
            executor=self.executor,
            planner=self._timed(get_planner(config.planner.policy)),
            cost_model=CostModel(profile),
            spec=simulated_spec(profile),
            config=config,
            outputs=self._receive,
        )
        for number, request in enumerate(trace):
            self.executor.at(request.arrival_s, lambda number=number: self._arrive(number))  # type: ignore[misc]
        for loss in losses:
            self.executor.at(loss.time_s, lambda loss=loss: self._lose(loss.device_id))  # type: ignore[misc]

    def to_end(self) -> SimulatedRun:
        asyncio.run(self.loop.run())
        outcomes = tuple(
            Outcome(request=request, finished_s=finished_s, gpu_s=gpu_s, degrees=degrees)
            for request, (finished_s, degrees), gpu_s in zip(self.trace, self.finished, self.gpu_s, strict=True)
        )
        return SimulatedRun(
            outcomes=outcomes,
            num_devices=len(self.executor.device_ids),
            end_s=self.executor.now_s(),
            decision_s=tuple(self.decision_s),
        )

    def _arrive(self, number: int) -> None:
        if self.executor.alive:
            self.loop.submit(as_image_request(self.trace[number], number))
        else:
            self._ended()

    def _lose(self, device_id: int) -> None:
        if device_id in self.executor.alive:
            self.executor.lose(device_id)

    def _spend(self, command: Command, seconds: float) -> float:
        seconds = self.duration(command, seconds)
        num_members = len(command.members) if isinstance(command, Denoise) else 1
        self.gpu_s[int(command.request_id)] += num_members * seconds  # type: ignore[union-attr]
        return seconds

    def _timed(self, planner: Planner) -> Planner:
        def plan(snapshot: Snapshot) -> RoundPlan:
            start_s = time.perf_counter()
            made = planner(snapshot)
            self.decision_s.append(time.perf_counter() - start_s)
            return made

        return plan

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


def as_image_request(request: TraceRequest, number: int) -> ImageRequest:
    """Request `number` of a trace as the engine takes it."""
    return ImageRequest(
        prompt="simulated",
        width=request.width,
        height=request.height,
        num_steps=request.num_steps,
        guidance=0.0,
        seed=0,
        slo_ms=None if request.slo_s is None else request.slo_s * 1e3,
        weight=request.weight,
        request_id=f"{number:06d}",
    )


def simulated_spec(profile: Profile) -> ModelSpec:
    """A model of which only the number of heads matters: it decides the legal degrees."""
    return ModelSpec(
        name=profile.model or "simulated",
        path="",
        architecture="simulated",
        num_heads=profile.heads,
        head_dim=128,
        in_channels=64,
        text_dim=1,
        pooled_dim=1,
        guidance_embeds=False,
        vae_scale_factor=8,
        scheduler=SchedulerSpec(),
        num_steps=28,
        guidance=0.0,
        max_text_tokens=512,
        min_size=16,
        max_size=65536,
        default_width=1024,
        default_height=1024,
    )
