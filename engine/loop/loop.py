"""The engine loop: collect, admit, plan, dispatch. Owns the life of every request between `submit` and its picture.

The loop knows an `Executor` (real or in virtual time), a planner (a pure function) and cost models; it imports no
torch, starts no process and reads no clock but the executor's. Pictures and progress leave through `outputs`.

`snapshots.py` makes what the planner sees, `dispatch.py` what devices are given, `progress.py` writes down what
commands and answers mean for a request, `recovery.py` says what happens when a worker is lost or fails.
"""

import itertools
import logging
import math
from collections.abc import Callable
from typing import assert_never

import msgspec

from tetrion.engine.config import EngineConfig
from tetrion.engine.energy.account import EnergyAccount, unmetered_account
from tetrion.engine.errors import (
    DeadlineUnmeetable,
    EngineEnded,
    EngineOverloaded,
    GenerationError,
    QueueTimeout,
    RequestCancelled,
    RequestError,
    shown,
)
from tetrion.engine.executors.base import Executor, Happening, PictureReady, WorkerLost, WorkerReady
from tetrion.engine.loop.deliveries import Deliveries
from tetrion.engine.loop.dispatch import command_for
from tetrion.engine.loop.guarded_planner import GuardedPlanner
from tetrion.engine.loop.in_flight import InFlight, InFlightTable
from tetrion.engine.loop.probation import Probation
from tetrion.engine.loop.progress import Answer, Bookkeeper
from tetrion.engine.loop.recovery import Recovery, RecoveryFigures
from tetrion.engine.loop.refusals import Refusals
from tetrion.engine.loop.request_table import RequestTable
from tetrion.engine.loop.requests import Request
from tetrion.engine.loop.snapshots import SnapshotBuilder
from tetrion.engine.loop.statistics import LoopStatistics
from tetrion.engine.messages import (
    BarriersReset,
    Decoded,
    Denoised,
    Encoded,
    Failed,
    LatentsCopied,
    Loaded,
    PeersMapped,
    Pong,
    Started,
)
from tetrion.engine.planning.admission import earliest_deadline_s
from tetrion.engine.planning.cost.correction import CostModels
from tetrion.engine.planning.degrees import DegreeTables
from tetrion.engine.planning.energy_admission import check_wish
from tetrion.engine.planning.energy_mode import may_be_patient
from tetrion.engine.planning.policies.registry import with_options
from tetrion.engine.planning.remaining import Remaining, remaining
from tetrion.engine.planning.snapshot import Assignment, Planner, RoundPlan
from tetrion.engine.request import Delivered, Output, ResolvedRequest
from tetrion.engine.roles import able

logger = logging.getLogger(__name__)
FIRST_COMMAND_ID = 1_000_000
"""Ids below are the start-up's own."""
PICTURES_OF = {"encode": "the pictures that it brings", "decode": "its picture"}
"""What commands of a stage may have to wait for room for."""
MAX_INPUT_BYTES = 1 << 30
"""Of pictures that living requests have brought."""
SHORTEST_WAIT_S = 0.0005
"""A plan that asks to be made again at once must not keep the loop spinning."""
FULL_CHANNEL_WAIT_S = 0.001
"""After this, what could not be dispatched is planned again; later after as long as it has been refused, at most
`LONGEST_REFUSAL_WAIT_S`."""
LONGEST_REFUSAL_WAIT_S = 0.1
MAX_SAVED_BYTES = 1 << 28
"""States of requests that others' have taken the slots of."""
OVERDUE_WAIT_S = 0.25
"""So often the loop looks whether a late answer has become a stall."""


class EngineLoop:
    def __init__(
        self,
        *,
        executor: Executor,
        planner: Planner,
        cost_models: CostModels,
        config: EngineConfig,
        outputs: Callable[[Output], None],
        energy: EnergyAccount | None = None,
    ) -> None:
        self._config = with_options(config.planner)
        self.executor = executor
        self.planner = planner
        self.cost_models = cost_models
        self.table = RequestTable(
            config.max_inflight,
            config.max_queued,
            self._config.patience_s,
            is_patient=lambda request: may_be_patient(request.asked, self._config),
            remaining=self._remaining,
        )
        self.statistics = LoopStatistics(len(executor.device_ids), executor.now_s())
        self.deliveries = Deliveries(self.statistics.tenants.ended)
        self._in_flight = InFlightTable(executor.device_ids)
        self._snapshots = SnapshotBuilder(executor, self.table, self._in_flight, self._config)
        self._probation = Probation(self.table, self._in_flight, self._snapshots)
        self._guarded_planner = GuardedPlanner(self._config.policy)
        self._refusals = Refusals()
        self._stall_timeout_s = config.stall_timeout_s
        self._queue_timeout_s = config.queue_timeout_s or math.inf
        self._command_ids = itertools.count(FIRST_COMMAND_ID)
        self._books = Bookkeeper(
            executor=executor,
            table=self.table,
            in_flight=self._in_flight,
            cost_models=cost_models,
            statistics=self.statistics,
            energy=energy or unmetered_account(executor.device_ids),
            outputs=outputs,
            deliveries=self.deliveries,
        )
        self._recovery = Recovery(
            executor=executor,
            table=self.table,
            in_flight=self._in_flight,
            books=self._books,
            command_ids=self._command_ids,
            stall_timeout_s=config.stall_timeout_s,
            no_worker_timeout_s=config.no_worker_timeout_s,
        )
        self._done: dict[str, list[tuple[InFlight, Answer | Failed]]] = {}
        """Commands that all members have answered, of requests whose command before is not answered yet."""
        self._num_usable = len(executor.device_ids)
        self._round_id = 0
        self._wake_s: float | None = None
        self._due_s = self._planned_s = -math.inf
        self._has_news = True
        self._stopping = False

    @property
    def recovery_figures(self) -> RecoveryFigures:
        return self._recovery.figures

    @property
    def policy(self) -> str:
        """The policy in use: the one that was asked for, unless it failed again and again."""
        return self._guarded_planner.policy

    # The caller's side -------------------------------------------------------------------------------------------

    def submit(self, resolved: ResolvedRequest) -> Request:
        """Queue a resolved request. Raises RequestError for what its energy asks for (BudgetUnmeetable),
        EngineOverloaded (DeadlineUnmeetable where admission says so), or GenerationError if admission itself fails."""
        request = Request(resolved, self.executor.now_s(), self._predicted_deliver_s(resolved))
        try:
            self._check(resolved, request)
            self.table.add(request)
        except RequestError:
            raise
        except EngineOverloaded:
            self.statistics.tenants.refused(request.asked.tenant)
            raise
        except Exception as error:
            logger.error("request %s failed: its admission", request.request_id, exc_info=error)
            raise GenerationError(f"its admission failed: {shown(error)}") from error
        self._wake()
        return request

    def _predicted_deliver_s(self, resolved: ResolvedRequest) -> float:
        width, height = resolved.params.shape.size
        return self.deliveries.model.predict_s(resolved.asked.delivery, width * height)

    def _check(self, resolved: ResolvedRequest, request: Request) -> None:
        """Raises RequestError or EngineOverloaded."""
        if request.inputs and (held := self.table.input_bytes) + request.input_bytes > MAX_INPUT_BYTES:
            raise EngineOverloaded(f"pictures of living requests hold {held} of {MAX_INPUT_BYTES} bytes already")
        check_wish(resolved, self._degree_tables(), self._config, request.deliver_s)
        if self._config.admission == "reject-hopeless" and request.asked.slo_ms is not None:
            self._refuse_hopeless(request, request.asked.slo_ms)

    def _degree_tables(self) -> DegreeTables:
        return DegreeTables(self.cost_models.tables, len(able(self.executor.stages, "denoise")))

    def _refuse_hopeless(self, request: Request, slo_ms: float) -> None:
        """Raises DeadlineUnmeetable."""
        earliest_s = earliest_deadline_s(self._snapshots.forecast(self.cost_models.tables, request))
        if earliest_s is not None:
            raise DeadlineUnmeetable(slo_ms, math.ceil((earliest_s + request.deliver_s - request.arrival_s) * 1e3))

    def _remaining(self, request: Request) -> Remaining:
        table = self._snapshots.tables(self.cost_models.tables)[request.params.model, request.cost_key]
        return remaining(table, request.planned_stage, request.num_steps - request.planned_step_index)

    def cancel(self, request_id: str) -> None:
        """Cancel at the next chunk boundary; unknown or finished requests are left alone."""
        request = self.table.get(request_id)
        if request is not None:
            self.table.cancel(request)
            self._wake()

    def delivered(self, request_id: str, took_s: float) -> Delivered | None:
        """See `Deliveries.delivered`."""
        return self.deliveries.delivered(request_id, self.executor.now_s(), took_s)

    def _wake(self) -> None:
        self._has_news = True
        self.executor.wake()

    def stop(self) -> None:
        """Make `run` return after the tick it is in. Requests still alive fail."""
        self._stopping = True
        self.executor.wake()

    # The loop ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until `stop`, and until the last pictures are copied. Raises EngineEnded if it cannot serve any more (see
        recovery.py)."""
        try:
            while not self._stopping:
                begun_s = self.executor.now_s()
                self._recovery.stood_still(begun_s - self._due_s)
                self.tick()
                self._recovery.stood_still(self.executor.now_s() - begun_s)
                wake_s = self._next_wake_s()
                self._due_s = math.inf if wake_s is None else wake_s
                await self.executor.wait(wake_s)
        except EngineEnded as error:
            await self._end_all(error)
            raise
        await self._end_all(GenerationError("the engine was stopped"))

    async def _end_all(self, reason: GenerationError) -> None:
        """Requests still alive fail; those whose picture is being copied get it."""
        for request in self.table.all():
            self._books.end(request, reason)
        while self._books.awaits_pictures:
            for event in self.executor.poll():
                if isinstance(event, PictureReady):
                    self._books.picture_ready(event)
            if self._books.awaits_pictures:
                await self.executor.wait(None)

    def tick(self) -> None:
        begun = self.statistics.begin_tick()
        self.table.at(self.executor.now_s())
        self.collect()
        self.admit()
        if self._must_plan():
            self.dispatch(self.plan())
        self.statistics.end_tick(begun)

    def collect(self) -> None:
        """Take what the workers have answered, and finished pictures."""
        for event in self.executor.poll():
            self._handle(event)
        self._recovery.check_stalls()
        for request_id in list(self._done):
            self._write_down(request_id)
        self._recovery.proceed()

    def admit(self) -> None:
        """Let go those that were cancelled or have failed; give slots to queued ones, if need be from others (see
        `RequestTable.next_exchange`)."""
        for request in self.table.cancelled():
            if not self._in_flight.of_request(request.request_id):
                cancelled = RequestCancelled(f"request {request.request_id} was cancelled")
                self._books.end(request, request.error or cancelled)
        if self._num_usable != len(self._snapshots.usable):
            self._num_usable = len(self._snapshots.usable)
            self.table.judge_all()
        self._give_slots()
        while (exchange := self.table.next_exchange(self._is_at_rest)) is not None and self._can_save(exchange[0]):
            self._set_aside(exchange[0])
            self._give_slots(exchange[1])
        self._end_silent()

    def _give_slots(self, first: Request | None = None) -> None:
        for request in self.table.admit(first):
            if request.saved is not None:
                self.executor.write_saved(request.params, request.slot, request.chunk_index, request.saved)
                request.saved = None
            self.statistics.admitted(self.executor.now_s())

    def _is_at_rest(self, request: Request) -> bool:
        return self._recovery.is_healthy and not self._in_flight.of_request(request.request_id)

    def _can_save(self, request: Request) -> bool:
        return not request.step_index or self.table.saved_bytes < MAX_SAVED_BYTES

    def _set_aside(self, request: Request) -> None:
        """Another's request gets its slot, and it is queued again with the state that it has."""
        if request.step_index:
            request.saved = self.executor.read_saved(request.params, request.slot, request.chunk_index)
        self.table.set_aside(request)
        self.statistics.ended(self.executor.now_s())

    def _end_silent(self) -> None:
        """Requests for which nothing has happened for too long fail: those without a slot, and those that own one and
        are given nothing. One that a device is at goes on; so does one that owns a slot while there is no device."""
        timeout_s = self._queue_timeout_s
        if timeout_s == math.inf:
            return
        now_s = self.executor.now_s()
        if not self._snapshots.usable:
            for request in self.table.admitted():
                self.table.heard_of(request)
        while (silent := self.table.longest_silent()) is not None and now_s >= silent[1] + timeout_s:
            request = silent[0]
            if self._in_flight.of_request(request.request_id) or self._recovery.is_hit(request.request_id):
                self.table.heard_of(request)
            else:
                self._books.end(request, QueueTimeout(f"it has waited for {timeout_s:g} s, and no device had time"))

    def _must_plan(self) -> bool:
        """Whether something has happened since the last plan, or it is time. (Between the first and the last answer of
        a group's members nothing happens.)"""
        has_news, self._has_news = self._has_news, False
        return has_news or self.executor.now_s() >= self._due_s

    def plan(self) -> RoundPlan:
        """Ask the policy what runs next; those that it cannot plan fail."""
        self._planned_s = self.executor.now_s()
        if not self._recovery.is_healthy:
            return RoundPlan()
        alone = self._probation.plan(self.cost_models.tables)
        snapshot = self._snapshots.snapshot(self.cost_models.tables)
        if snapshot is None:
            return RoundPlan(assignments=alone)
        plan, failed = self._guarded_planner.plan(self.planner, snapshot, self._snapshots.view_of)
        for request_id, error in failed.items():
            self._fail(request_id, f"the policy {self.policy} cannot plan it", error)
        return msgspec.structs.replace(plan, assignments=alone + plan.assignments) if alone else plan

    def dispatch(self, plan: RoundPlan) -> None:
        """Turn assignments into commands, each given to all of its members or to none. What goes wrong with one ends
        its request and is no matter for the others."""
        self.statistics.planned(len(self._in_flight.devices), plan.num_held, self.executor.now_s())
        self._wake_s = plan.wake_s
        self._round_id += bool(plan.assignments)
        for assignment in plan.assignments:
            request = self.table.get(assignment.request_id)
            assert request is not None
            try:
                self._give(assignment, request)
            except Exception as error:
                self._fail(assignment.request_id, "its next command could not be sent", error)

    # Its parts ---------------------------------------------------------------------------------------------------

    def _give(self, assignment: Assignment, request: Request) -> None:
        """Give the command to its members, or see to it that this is tried again. Whatever it raises, either nothing
        was sent and everything is given back, or the command is in flight."""
        members, command_id = assignment.members, next(self._command_ids)
        executor, pictures = self.executor, PICTURES_OF.get(assignment.stage)
        slots = executor.acquire_image_slot, executor.put_pictures
        command = command_for(assignment, request, command_id, self._round_id, *slots)
        if command is None:
            assert pictures is not None
            self._no_room_for(pictures)
            return
        if pictures is not None:
            self._refusals.over([pictures])
        try:
            duration_s = self._books.sending(command, members)
            is_taken = self.executor.submit(command, members)
        except Exception:
            self._books.not_sent(command, members)
            raise
        if is_taken:
            self._refusals.over(members)
            self._recovery.sent(self._books.sent(request, command, members, duration_s))
            self._snapshots.ran(request, duration_s * len(members))
        else:
            self._books.not_sent(command, members)
            self._ring_full(members)

    def _no_room_for(self, pictures: str) -> None:
        """All are taken, by pictures being encoded, decoded or copied. Raises TimeoutError if none has come back for
        long."""
        refused_s = self._refusals.refused_s(pictures, self.executor.now_s())
        if refused_s > self._stall_timeout_s:
            raise TimeoutError(f"no room for {pictures} for {refused_s:.0f} s")
        self._try_again(refused_s)

    def _ring_full(self, members: tuple[int, ...]) -> None:
        """Some member has not read what it was given before. One that reads nothing for long is killed."""
        now_s = self.executor.now_s()
        refused_s = {member: self._refusals.refused_s(member, now_s) for member in members}
        for member in [member for member in members if refused_s[member] > self._stall_timeout_s]:
            self._refusals.over([member])
            self.executor.kill(member, f"it has not taken its commands for {refused_s[member]:.0f} s")
        self._try_again(max(refused_s.values()))

    def _try_again(self, refused_s: float) -> None:
        wait_s = min(max(FULL_CHANNEL_WAIT_S, refused_s), LONGEST_REFUSAL_WAIT_S)
        wake_s = self.executor.now_s() + wait_s
        self._wake_s = wake_s if self._wake_s is None else min(self._wake_s, wake_s)

    def _fail(self, request_id: str, what: str, error: Exception) -> None:
        """End a request that cannot go on; the others are planned anew."""
        request = self.table.get(request_id)
        if request is not None:
            self._books.fail(request, what, error)
        self._wake()

    def _handle(self, event: Happening) -> None:
        match event:
            case Encoded() | Denoised() | Decoded() | Failed():
                self._on_answer(event)
            case PictureReady():
                self._books.picture_ready(event)
            case BarriersReset():
                self._recovery.barriers_reset(event)
                self._has_news = True
            case WorkerLost():
                self._recovery.worker_lost(event)
                self._has_news = True
            case WorkerReady():
                self._recovery.num_respawns += 1
                logger.info("worker %d was started again", event.device_id)
            case Started() | Loaded() | PeersMapped() | LatentsCopied() | Pong():
                logger.warning("unexpected event %s", event)
            case _:
                assert_never(event)

    def _on_answer(self, event: Answer | Failed) -> None:
        """With the answer of its first member a command is about to be done, with that of its last it is."""
        entry = self._books.answered(event, self.executor.now_s())
        if entry is None:
            self._recovery.answered_late(event)
            return
        self._has_news |= isinstance(event, Failed) or len(entry.pending) in (0, len(entry.members) - 1)
        if isinstance(event, Failed):
            self._recovery.request_failed(event, entry.command)
        else:
            self._recovery.executed(entry, event.device_id)
        if not entry.pending:
            self._done.setdefault(event.request_id, []).append((entry, event))
            self._write_down(event.request_id)

    def _write_down(self, request_id: str) -> None:
        """What has come of a request's commands, in the order in which they were given: a member of the first may
        answer later than those of the second."""
        while done := self._done.get(request_id):
            done.sort(key=lambda item: item[0].command.command_id)
            entry, event = done[0]
            earlier = self._in_flight.of_request(request_id)[:1]
            if earlier and earlier[0].command.command_id < entry.command.command_id:
                return
            del done[0]
            if isinstance(event, Failed) or entry.is_cut_off or not self._recovery.counts(entry.command):
                self._books.discard(entry.command)
            else:
                self._books.executed(entry, event)
        self._done.pop(request_id, None)

    def _next_wake_s(self) -> float | None:
        """When to tick without an event: when the plan asked for it, just before a command ends (at once if that has
        come since the last plan), to see stalls."""
        now_s, lead_s = self.executor.now_s(), self._config.lead_s
        times = [entry.end_s - lead_s for entry in self._in_flight]
        times = [time_s if time_s > self._planned_s else now_s + OVERDUE_WAIT_S for time_s in times]
        if self._wake_s is not None:
            times.append(max(self._wake_s, self._planned_s + SHORTEST_WAIT_S))
        if self._recovery.is_waiting:
            times.append(now_s + OVERDUE_WAIT_S)
        if (silent := self.table.longest_silent()) is not None and self._queue_timeout_s < math.inf:
            times.append(silent[1] + self._queue_timeout_s)
        return min(times, default=None)
