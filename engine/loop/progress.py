"""What a command sent, its answers and the end of a request change: everything the loop writes down of them.

Owns no decision. Writes the progress of requests, what is in flight, the cost model, the loop's own figures and the
energy account, and tells callers through `outputs`. Knows neither planner nor recovery.

What goes wrong while something is written down of a request (in the cost model, the figures, the energy account or a
caller's `outputs`) ends that request alone, by `fail`; only `sending` and `sent` raise, to whoever sends. What is in
flight is written down first of all and depends on nothing that may fail, so the tables stay right.
"""

import logging
from collections.abc import Callable

from tetrion.engine.energy.account import EnergyAccount, RequestFacts
from tetrion.engine.errors import GenerationError, RequestCancelled, shown
from tetrion.engine.executors.base import Executor, PictureReady
from tetrion.engine.loop.deliveries import Deliveries
from tetrion.engine.loop.in_flight import InFlight, InFlightTable
from tetrion.engine.loop.request_table import RequestTable
from tetrion.engine.loop.requests import STAGE_STATES, TERMINAL_STATES, Request, RequestState
from tetrion.engine.loop.statistics import LoopStatistics
from tetrion.engine.messages import Decode, Decoded, Denoise, Denoised, Encoded, EncodePrompt, Failed, StageCommand
from tetrion.engine.planning.cost.correction import CostModel, CostModels
from tetrion.engine.planning.cost.predict import predict_j, predict_s
from tetrion.engine.request import Failure, Output, Receipt
from tetrion.engine.stages import AFTER_STEPS, NEXT_STAGE, Stage

logger = logging.getLogger(__name__)
NOT_WRITTEN = "what came of it could not be written down"

Answer = Encoded | Denoised | Decoded
"""What a member says of a command that it has executed."""


class Bookkeeper:
    def __init__(
        self,
        *,
        executor: Executor,
        table: RequestTable,
        in_flight: InFlightTable,
        cost_models: CostModels,
        statistics: LoopStatistics,
        energy: EnergyAccount,
        outputs: Callable[[Output], None],
        deliveries: Deliveries,
    ) -> None:
        self._executor = executor
        self._table = table
        self._in_flight = in_flight
        self._cost_models = cost_models
        self._statistics = statistics
        self._energy = energy
        self._outputs = outputs
        self._deliveries = deliveries
        self._being_copied: dict[int, Request] = {}
        """Requests that have ended but for their picture, by the id of the command that decoded it."""

    # A command's members ------------------------------------------------------------------------------------------

    def sending(self, command: StageCommand, members: tuple[int, ...]) -> float:
        """A command is about to be given to its members; returns how long it is predicted to take. The energy account
        must know before it can begin: readings are settled in another thread up to where nobody has been given
        anything."""
        costs = self._cost_models.tables
        duration_s = predict_s(command, costs)
        self._energy.sent(command, members, costs, self._executor.now_s())
        return duration_s

    def not_sent(self, command: StageCommand, members: tuple[int, ...]) -> None:
        """They did not take it, or it could not be sent."""
        self.discard(command)
        for member in members:
            self._guarded(command.request_id, self._energy.failed, command.command_id, member, self._executor.now_s())

    def sent(self, request: Request, command: StageCommand, members: tuple[int, ...], duration_s: float) -> InFlight:
        """The request's next command was given to its members."""
        now_s = self._executor.now_s()
        if request.started_s is None:
            request.started_s = now_s
        entry = self._in_flight.add(command, members, now_s, duration_s)
        if isinstance(command, Denoise):
            request.planned_step_index += command.chunk_steps
            request.planned_chunk_index += 1
        if not isinstance(command, Decode):
            request.planned_holders, request.planned_state_id = members, command.state_id
            request.is_retried = False
        request.planned_stage = _stage_after(command, request)
        self._follow(request)
        self._statistics.sent(command.command_id, members, now_s)
        request.spent_j += predict_j(command, self._cost_models.tables)
        return entry

    def answered(self, event: Answer | Failed, now_s: float) -> InFlight | None:
        """A member has answered. Returns the command (done when nobody is pending), None if no answer was due."""
        entry = self._in_flight.answer(event.command_id, event.device_id, now_s)
        if entry is None:
            return None
        if isinstance(event, Failed):
            entry.is_cut_off = True
            self.member_failed(entry.command, event.device_id, now_s)
        else:
            self._guarded(event.request_id, self._member_executed, event, now_s)
            request = self._table.get(event.request_id)
            if request is not None:
                self._statistics.tenants.ran(request.asked.tenant, event.ended_s - event.started_s)
        return entry

    def member_failed(self, command: StageCommand, device_id: int, now_s: float) -> None:
        """A member has failed or is lost."""
        self._guarded(command.request_id, self._member_failed, command.command_id, device_id, now_s)

    def _member_executed(self, event: Answer, now_s: float) -> None:
        try:
            self._statistics.answered(event.command_id, event.started_s, event.ended_s)
        finally:  # whom nobody tells of an answer waits for it for ever
            self._energy.answered(event.command_id, event.device_id, event.started_s, event.ended_s, now_s)

    def _member_failed(self, command_id: int, device_id: int, now_s: float) -> None:
        try:
            self._statistics.failed(command_id, now_s)
        finally:
            self._energy.failed(command_id, device_id, now_s)

    # A whole command ----------------------------------------------------------------------------------------------

    def executed(self, entry: InFlight, event: Answer) -> None:
        """All members have answered, `event` being the last answer: the request goes on."""
        request = self._table.get(event.request_id)
        if request is None:
            self.discard(entry.command)
            return
        try:
            self._encoded_pictures(entry.command)
            self._enter(request, entry.command)
            match event:
                case Encoded():
                    self._encoded(request, entry, event)
                case Denoised():
                    self._denoised(request, entry, event)
                case Decoded():
                    self._decoded(request, entry.command, event)
        except Exception as error:
            self.fail(request, NOT_WRITTEN, error)

    def discard(self, command: StageCommand) -> None:
        """Nobody wants the command's result."""
        if isinstance(command, Decode):
            self._executor.release_image_slot(command.image_slot)
        elif isinstance(command, EncodePrompt):
            self._encoded_pictures(command)

    def _encoded_pictures(self, command: StageCommand) -> None:
        """Nobody reads them any more."""
        if isinstance(command, EncodePrompt) and command.input_slot is not None:
            self._executor.release_input_slot(command.input_slot)

    def _encoded(self, request: Request, entry: InFlight, event: Encoded) -> None:
        self._is_held(request, entry)
        request.num_text_tokens = event.num_text_tokens
        self._observe_aux(request, event)
        self._move(request, STAGE_STATES[request.next_stage][0])

    def _denoised(self, request: Request, entry: InFlight, event: Denoised) -> None:
        degree, chunk_steps = len(entry.members), event.step_index - request.step_index
        elapsed_s = event.ended_s - event.started_s - event.waited_s
        self._cost_model_of(request).observe_step(request.cost_key, degree, elapsed_s / chunk_steps)
        request.stage_s["denoise"] += elapsed_s
        request.step_index = event.step_index
        request.chunk_index += 1
        self._is_held(request, entry)
        request.degrees += [degree] * chunk_steps
        self._move(request, STAGE_STATES[request.next_stage][0])

    def _is_held(self, request: Request, entry: InFlight) -> None:
        """The members have the request's state."""
        assert not isinstance(entry.command, Decode)
        request.holders = tuple(member for member in entry.members if member in self._in_flight.devices)
        request.state_id = entry.command.state_id

    def _decoded(self, request: Request, command: StageCommand, event: Decoded) -> None:
        """If nobody wants it any more, or something goes wrong, its slot is free again."""
        assert isinstance(command, Decode)
        receipt = None
        try:
            receipt = self._finished(request, event)
        finally:
            if receipt is None:
                self.discard(command)
        if receipt is not None:
            self._executor.take_image(command, receipt)
            self._being_copied[command.command_id] = request

    def _finished(self, request: Request, event: Decoded) -> Callable[[], Receipt] | None:
        """What gives the receipt of a request that has its picture, None if nobody wants it any more."""
        self._observe_aux(request, event)
        if request.cancelled:
            return None
        receipt = self._ended(request)
        self._table.move(request, RequestState.FINISHED)
        self._statistics.ended(event.ended_s)
        self._outputs(request.progress())
        return receipt

    def _cost_model_of(self, request: Request) -> CostModel:
        return self._cost_models[request.params.model]

    def _observe_aux(self, request: Request, event: Encoded | Decoded) -> None:
        elapsed_s = event.ended_s - event.started_s
        request.stage_s[event.stage] += elapsed_s
        self._cost_model_of(request).observe_aux(request.cost_key, event.stage, elapsed_s)

    def _move(self, request: Request, state: RequestState) -> None:
        self._table.move(request, state)
        self._follow(request)
        self._outputs(request.progress())

    def _follow(self, request: Request) -> None:
        """If a request's next command is dispatched, its state says so."""
        for entry in self._in_flight.of_request(request.request_id)[:1]:
            self._enter(request, entry.command)

    def _enter(self, request: Request, command: StageCommand) -> None:
        """The request is in this command's stage."""
        is_ready, is_in_it = STAGE_STATES[command.stage]
        if request.state is is_ready:
            self._table.move(request, is_in_it)

    # A picture ----------------------------------------------------------------------------------------------------

    @property
    def awaits_pictures(self) -> bool:
        """Whether some are still being copied."""
        return bool(self._being_copied)

    def picture_ready(self, event: PictureReady) -> None:
        """The request has its result, or fails."""
        request = self._being_copied.pop(event.command_id)
        if event.error is not None:
            self.fail(request, "the picture could not be copied, or its receipt not made", event.error)
            return
        try:
            self._deliveries.finished(request, event.ready_s)
            self._outputs(request.result(event.image, event.ready_s, event.receipt))
        except Exception as error:
            self.fail(request, "its result could not be handed out", error)

    # A request's end ----------------------------------------------------------------------------------------------

    def fail(self, request: Request, what: str, error: Exception) -> None:
        """An error that concerns this request alone ends it: at once, or with the last answer to its commands, which
        hold its slot until then."""
        logger.error("request %s failed: %s", request.request_id, what, exc_info=error)
        failure = GenerationError(f"{what}: {shown(error)}")
        if request.state not in TERMINAL_STATES and self._in_flight.of_request(request.request_id):
            self._table.cancel(request, failure)
        else:
            self.end(request, failure)

    def end(self, request: Request, error: Exception) -> None:
        """End a request without a picture. Raises nothing: it cannot end twice."""
        if request.state not in TERMINAL_STATES:
            was_queued, cancelled = request.state is RequestState.QUEUED, isinstance(error, RequestCancelled)
            self._table.move(request, RequestState.CANCELLED if cancelled else RequestState.FAILED)
            if not was_queued:
                self._logged(request, self._statistics.ended, self._executor.now_s())
            if request.deadline_s is not None and not (cancelled and self._executor.now_s() < request.deadline_s):
                self._statistics.tenants.ended(request.asked.tenant, is_met=False)
            self._logged(request, self._ended, request)
        self._logged(request, self._outputs, Failure(request_id=request.request_id, error=error))

    def _guarded(self, request_id: str, write: Callable[..., object], *arguments: object) -> None:
        """`write(*arguments)`; an error ends the request."""
        try:
            write(*arguments)
        except Exception as error:
            request = self._table.get(request_id)
            if request is not None:
                self.fail(request, NOT_WRITTEN, error)
            else:
                logger.error("request %s has ended, and %s", request_id, NOT_WRITTEN, exc_info=error)

    def _logged(self, request: Request, write: Callable[..., object], *arguments: object) -> None:
        """`write(*arguments)` of a request that has ended: an error can do no more than be logged."""
        try:
            write(*arguments)
        except Exception as error:
            logger.error("request %s has ended, and %s", request.request_id, NOT_WRITTEN, exc_info=error)

    def _ended(self, request: Request) -> Callable[[], Receipt]:
        """The request is over; the answer says what it has cost."""
        facts = RequestFacts(
            request_id=request.request_id,
            model=request.params.model,
            cost_key=request.cost_key,
            degrees=tuple(request.degrees),
        )
        return self._energy.ended(facts, self._cost_models.tables, self._executor.now_s())


def _stage_after(command: StageCommand, request: Request) -> Stage | None:
    """What comes after a command that was just dispatched; None after the last."""
    following = command.stage if command.stage == "denoise" else NEXT_STAGE[command.stage]
    is_denoised = following == "denoise" and request.planned_step_index == request.num_steps
    return AFTER_STEPS[0] if is_denoised else following
