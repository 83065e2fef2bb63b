"""The engine loop: collect, admit, plan, dispatch. Owns the life of every request between `submit` and its picture.

The loop knows an `Executor` (real or in virtual time), a planner (a pure function) and a cost model; it imports no
torch, starts no process and reads no clock but the executor's. Pictures and progress leave through `outputs`.
"""

import itertools
import logging
from collections.abc import Callable
from typing import assert_never

from tetrion.engine.commands import decode_command, denoise_command, encode_command, predict_s
from tetrion.engine.config import EngineConfig
from tetrion.engine.executor import Executor, WorkerLost
from tetrion.engine.inflight import InFlight, InFlightTable
from tetrion.engine.messages import (
    BarriersReset,
    Decode,
    Decoded,
    Denoise,
    Denoised,
    Encoded,
    EncodePrompt,
    Event,
    Failed,
    GroupCommand,
    LatentsCopied,
    Loaded,
    Pong,
    ResetBarriers,
    Started,
)
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.outlook import take_snapshot
from tetrion.engine.planning.correction import CostModel
from tetrion.engine.planning.snapshot import (
    Assignment,
    Planner,
    RoundPlan,
)
from tetrion.engine.recovery import MAX_ATTEMPTS, Recovery
from tetrion.engine.request import (
    Failure,
    GenerationError,
    ImageRequest,
    Output,
    RequestCancelled,
)
from tetrion.engine.request_table import Request, RequestState, RequestTable

logger = logging.getLogger(__name__)
FIRST_COMMAND_ID = 1_000_000
"""Ids below are the start-up's own."""
SHORTEST_WAIT_S = 0.0005
"""A plan that asks to be made again at once must not keep the loop spinning."""


class EngineLoop:
    def __init__(
        self,
        *,
        executor: Executor,
        planner: Planner,
        cost_model: CostModel,
        spec: ModelSpec,
        config: EngineConfig,
        outputs: Callable[[Output], None],
    ) -> None:
        self.executor = executor
        self.planner = planner
        self.cost_model = cost_model
        self.table = RequestTable(config.max_inflight, config.max_queued, config.planner.patience_s)
        self._config = config.planner
        self._stall_timeout_s = config.stall_timeout_s
        self._outputs = outputs
        self._legal_degrees = spec.legal_degrees(len(executor.device_ids))
        self._in_flight = InFlightTable(executor.device_ids)
        self._recovery = Recovery(self.table, self._in_flight)
        self._ids = itertools.count(FIRST_COMMAND_ID)
        self._round_id = 0
        self._wake_s: float | None = None
        self._stopping = False

    # The caller's side -------------------------------------------------------------------------------------------

    def submit(self, params: ImageRequest) -> Request:
        """Queue a resolved request. Raises EngineOverloaded, or GenerationError if no worker is left."""
        if not self.executor.alive:
            raise GenerationError("no worker is alive")
        request = Request(params, self.executor.now_s())
        self.table.add(request)
        self.executor.wake()
        return request

    def cancel(self, request_id: str) -> None:
        """Cancel at the next chunk boundary; unknown or finished requests are left alone."""
        request = self.table.get(request_id)
        if request is not None:
            request.cancelled = True
            self.executor.wake()

    def stop(self) -> None:
        """Make `run` return after the tick it is in. Requests still alive fail."""
        self._stopping = True
        self.executor.wake()

    # The loop ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        while not self._stopping:
            self.tick()
            await self.executor.wait(self._next_wake_s())
        for request in self.table.all():
            self._end(request, GenerationError("the engine was stopped"))

    def tick(self) -> None:
        self.collect()
        self.admit()
        self.dispatch(self.plan())

    def collect(self) -> None:
        """Take what the workers have answered."""
        for event in self.executor.poll():
            self._handle(event)
        self._check_stalls()
        self._recover()

    def admit(self) -> None:
        """Let go those that were cancelled or that no worker is left for; give slots to queued ones."""
        for request in self.table.all():
            if request.cancelled and not self._in_flight.of_request(request.request_id):
                self._end(request, RequestCancelled(f"request {request.request_id} was cancelled"))
            elif not self.executor.alive:
                self._end(request, GenerationError("no worker is alive"))
        self.table.admit()

    def plan(self) -> RoundPlan:
        """Ask the policy what runs next."""
        if not self._recovery.healthy:
            return RoundPlan()
        snapshot = take_snapshot(
            self.executor,
            self.table,
            self._in_flight,
            self._legal_degrees,
            self.cost_model.profile,
            self._config,
        )
        return self.planner(snapshot) if snapshot.requests else RoundPlan()

    def dispatch(self, plan: RoundPlan) -> None:
        """Turn assignments into commands, each given to all of its members or to none."""
        self._wake_s = plan.wake_s
        self._round_id += bool(plan.assignments)
        for assignment in plan.assignments:
            request = self.table.get(assignment.request_id)
            assert request is not None
            command = self._command(request, assignment)
            if command is None or not self.executor.submit(command, assignment.members):
                if isinstance(command, Decode):
                    self.executor.release_image_slot(command.image_slot)
                self._wake_s = self.executor.now_s() + 0.001
                return
            self._record(request, command, assignment.members)

    # Dispatch ----------------------------------------------------------------------------------------------------

    def _command(self, request: Request, assignment: Assignment) -> GroupCommand | None:
        """The command for an assignment, or None while there is no room for its picture."""
        command_id = next(self._ids)
        match assignment.stage:
            case "encode":
                request.state_id = command_id
                return encode_command(request, command_id)
            case "denoise":
                return denoise_command(request, command_id, self._round_id, assignment)
            case "decode":
                image_slot = self.executor.acquire_image_slot()
                if image_slot is None:
                    return None
                return decode_command(request, command_id, assignment.members[0], image_slot)

    def _record(self, request: Request, command: GroupCommand, members: tuple[int, ...]) -> None:
        now_s = self.executor.now_s()
        if request.started_s is None:
            request.started_s = now_s
        self._in_flight.add(command, members, now_s, predict_s(command, self.cost_model.profile))
        if isinstance(command, Denoise):
            request.planned_step_index += command.chunk_steps
        if isinstance(command, (EncodePrompt, Denoise)):
            request.planned_holders = members
        self._follow(request)

    def _follow(self, request: Request) -> None:
        """If a request's next command is dispatched, its state says so."""
        for entry in self._in_flight.of_request(request.request_id)[:1]:
            if isinstance(entry.command, EncodePrompt) and request.state is RequestState.WAITING:
                self.table.move(request, RequestState.ENCODING)
            elif isinstance(entry.command, Denoise) and request.state is RequestState.READY:
                self.table.move(request, RequestState.DENOISING)
            elif isinstance(entry.command, Decode) and request.state is RequestState.DENOISED:
                self.table.move(request, RequestState.DECODING)

    def _next_wake_s(self) -> float | None:
        """When to tick without an event: when the plan asked for it, just before a command ends, to see stalls."""
        now_s = self.executor.now_s()
        times = [] if self._wake_s is None else [max(self._wake_s, now_s + SHORTEST_WAIT_S)]
        for entry in self._in_flight:
            lead_s = entry.end_s - self._config.lead_s
            times.append(lead_s if lead_s > now_s else now_s + 1.0)
        return min(times, default=None)

    # Events ------------------------------------------------------------------------------------------------------

    def _handle(self, event: Event | WorkerLost) -> None:
        match event:
            case Encoded() | Denoised() | Decoded() | Failed():
                self._on_answer(event)
            case BarriersReset():
                self._recovery.acknowledge(event.device_id)
            case WorkerLost():
                self._on_worker_lost(event)
            case Started() | Loaded() | LatentsCopied() | Pong():
                logger.warning("unexpected event %s", event)
            case _:
                assert_never(event)

    def _on_answer(self, event: Encoded | Denoised | Decoded | Failed) -> None:
        request = self.table.get(event.request_id)
        entry = self._in_flight.answer(event.command_id, event.device_id, self.executor.now_s())
        if request is None or entry is None:
            return
        if isinstance(event, Failed):
            self._on_failed(request, event)
        if entry.pending:
            return
        if isinstance(event, Failed) or self._recovery.is_hit(request.request_id):
            if isinstance(entry.command, Decode):
                self.executor.release_image_slot(entry.command.image_slot)
            return
        match event:
            case Encoded():
                self._on_encoded(request, event)
            case Denoised():
                self._on_chunk_done(request, entry, event)
            case Decoded():
                self._on_picture(request, event)

    def _on_encoded(self, request: Request, event: Encoded) -> None:
        request.encode_s = event.ended_s - event.started_s
        request.num_text_tokens = event.num_text_tokens
        self.cost_model.observe_encode(*request.size, request.encode_s)
        self.table.move(request, RequestState.READY)
        self._follow(request)
        self._outputs(request.progress())

    def _on_chunk_done(self, request: Request, entry: InFlight, event: Denoised) -> None:
        degree, chunk_steps = len(entry.members), event.step_index - request.step_index
        elapsed_s = event.ended_s - event.started_s - event.waited_s
        self.cost_model.observe_step(*request.size, degree, elapsed_s / chunk_steps)
        request.denoise_s += elapsed_s
        request.step_index = event.step_index
        request.degrees += [degree] * chunk_steps
        done = request.step_index == request.num_steps
        self.table.move(request, RequestState.DENOISED if done else RequestState.READY)
        self._follow(request)
        self._outputs(request.progress())

    def _on_picture(self, request: Request, event: Decoded) -> None:
        request.decode_s = event.ended_s - event.started_s
        self.cost_model.observe_decode(*request.size, request.decode_s)
        request.image = self.executor.read_image(event.image_slot, *request.size)
        self.executor.release_image_slot(event.image_slot)
        if request.cancelled:
            return
        self.table.move(request, RequestState.FINISHED)
        self._outputs(request.progress())
        self._outputs(request.result(self.executor.now_s()))

    def _end(self, request: Request, error: Exception) -> None:
        """End a request without a picture."""
        cancelled = isinstance(error, RequestCancelled)
        self.table.move(request, RequestState.CANCELLED if cancelled else RequestState.FAILED)
        self._outputs(Failure(request_id=request.request_id, error=error))

    # Failure -----------------------------------------------------------------------------------------------------

    def _on_failed(self, request: Request, event: Failed) -> None:
        if event.kind != "aborted":
            logger.error("request %s failed on worker %d: %s", event.request_id, event.device_id, event.message)
            request.attempts = MAX_ATTEMPTS
        if event.kind != "aborted" and not self._in_flight.of_request(event.request_id):
            self._end(request, GenerationError(event.message))
        else:
            self._recovery.hit(event.request_id, event.message)

    def _on_worker_lost(self, event: WorkerLost) -> None:
        """What ran there is hit, and so is every request whose latents only that worker held."""
        logger.error("worker %d was lost: %s", event.device_id, event.reason)
        for entry in self._in_flight.drop_device(event.device_id, self.executor.now_s()):
            self._recovery.hit(entry.command.request_id, event.reason)
            if isinstance(entry.command, Decode):
                self.executor.release_image_slot(entry.command.image_slot)
        for request in self.table.admitted():
            if event.device_id in request.planned_holders:
                self._recovery.hit(request.request_id, event.reason)
        self._recovery.acknowledge(event.device_id)

    def _check_stalls(self) -> None:
        """A worker that takes far longer than predicted is killed; it is then handled like any lost worker."""
        now_s = self.executor.now_s()
        for entry in self._in_flight:
            if now_s > entry.end_s + 10 * entry.duration_s + self._stall_timeout_s:
                for device_id in entry.pending:
                    self.executor.kill(device_id, f"no answer for {now_s - entry.start_s:.0f} s")

    def _recover(self) -> None:
        """Take the recovery one stage further (see `engine/recovery.py`)."""
        if self._recovery.healthy:
            return
        self.executor.abort(self._recovery.devices_to_abort() & self.executor.alive)
        if self._recovery.drained():
            self._recovery.start_reset(self.executor.alive)
            for device_id in self.executor.alive:
                self.executor.submit(ResetBarriers(command_id=next(self._ids)), (device_id,))
        for request, reason in self._recovery.finish():
            self._start_again(request, reason)

    def _start_again(self, request: Request, reason: str) -> None:
        request.attempts += 1
        if request.attempts >= MAX_ATTEMPTS or not self.executor.alive:
            self._end(request, GenerationError(reason))
            return
        request.reset_progress()
        if request.state is not RequestState.WAITING:
            self.table.move(request, RequestState.WAITING)
