"""What a command sent, its answers and the end of a request change: everything the loop writes down of them.

Owns no decision. Writes the progress of requests, what is in flight, the cost model, the loop's own figures and the
energy account, and tells callers through `outputs`. Knows neither planner nor recovery.
"""

from collections.abc import Callable
from typing import Any

from tetrion.engine.commands import predict_j, predict_s
from tetrion.engine.energy.account import EnergyAccount, RequestFacts
from tetrion.engine.energy.receipt import Receipt
from tetrion.engine.executor import Executor
from tetrion.engine.inflight import InFlight, InFlightTable
from tetrion.engine.loop_statistics import LoopStatistics
from tetrion.engine.messages import Decode, Decoded, Denoise, Denoised, Encoded, EncodePrompt, Failed, GroupCommand
from tetrion.engine.planning.correction import CostModel, CostModels
from tetrion.engine.request import Failure, GenerationError, Output, RequestCancelled
from tetrion.engine.request_table import Request, RequestState, RequestTable

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
    ) -> None:
        self._executor = executor
        self._table = table
        self._in_flight = in_flight
        self._cost_models = cost_models
        self._statistics = statistics
        self._energy = energy
        self._outputs = outputs

    # A command's members ------------------------------------------------------------------------------------------

    def sending(self, command: GroupCommand, members: tuple[int, ...]) -> None:
        """A command is about to be given to its members. The energy account must know before it can begin: readings are
        settled in another thread up to where nobody has been given anything."""
        self._energy.sent(command, members, self._cost_models.tables, self._executor.now_s())

    def not_sent(self, command: GroupCommand, members: tuple[int, ...]) -> None:
        """They did not take it."""
        for member in members:
            self._energy.failed(command.command_id, member, self._executor.now_s())
        self.discard(command)

    def sent(self, request: Request, command: GroupCommand, members: tuple[int, ...]) -> None:
        """The request's next command was given to its members."""
        now_s, costs = self._executor.now_s(), self._cost_models.tables
        if request.started_s is None:
            request.started_s = now_s
        self._in_flight.add(command, members, now_s, predict_s(command, costs))
        self._statistics.sent(command.command_id, members, now_s)
        request.spent_j += predict_j(command, costs)
        if isinstance(command, Denoise):
            request.planned_step_index += command.chunk_steps
        if isinstance(command, (EncodePrompt, Denoise)):
            request.planned_holders = members
        self._follow(request)

    def answered(self, event: Answer | Failed, now_s: float) -> InFlight | None:
        """A member has answered. Returns the command (done when nobody is pending), None if no answer was due."""
        entry = self._in_flight.answer(event.command_id, event.device_id, now_s)
        if entry is None:
            return None
        if isinstance(event, Failed):
            self.brings_nothing(event.command_id, event.device_id, now_s)
        else:
            self._statistics.answered(event.command_id, event.started_s, event.ended_s)
            self._energy.answered(event.command_id, event.device_id, event.started_s, event.ended_s, now_s)
        return entry

    def brings_nothing(self, command_id: int, device_id: int, now_s: float) -> None:
        """A member has failed or is lost."""
        self._statistics.failed(command_id, now_s)
        self._energy.failed(command_id, device_id, now_s)

    # A whole command ----------------------------------------------------------------------------------------------

    def executed(self, entry: InFlight, event: Answer) -> None:
        """All members have answered, `event` being the last answer: the request goes on."""
        request = self._table.get(event.request_id)
        assert request is not None
        match event:
            case Encoded():
                self._encoded(request, event)
            case Denoised():
                self._denoised(request, entry, event)
            case Decoded():
                self._decoded(request, event)

    def discard(self, command: GroupCommand) -> None:
        """Nobody wants the command's result."""
        if isinstance(command, Decode):
            self._executor.release_image_slot(command.image_slot)

    def _encoded(self, request: Request, event: Encoded) -> None:
        request.encode_s = event.ended_s - event.started_s
        request.num_text_tokens = event.num_text_tokens
        self._cost_model_of(request).observe_encode(request.cost_key, request.encode_s)
        self._move(request, RequestState.READY)

    def _denoised(self, request: Request, entry: InFlight, event: Denoised) -> None:
        degree, chunk_steps = len(entry.members), event.step_index - request.step_index
        elapsed_s = event.ended_s - event.started_s - event.waited_s
        self._cost_model_of(request).observe_step(request.cost_key, degree, elapsed_s / chunk_steps)
        request.denoise_s += elapsed_s
        request.step_index = event.step_index
        request.degrees += [degree] * chunk_steps
        done = request.step_index == request.num_steps
        self._move(request, RequestState.DENOISED if done else RequestState.READY)

    def _decoded(self, request: Request, event: Decoded) -> None:
        request.decode_s = event.ended_s - event.started_s
        self._cost_model_of(request).observe_decode(request.cost_key, request.decode_s)
        if request.cancelled:
            self._executor.release_image_slot(event.image_slot)
            return
        self._table.move(request, RequestState.FINISHED)
        self._statistics.ended(event.ended_s)
        self._outputs(request.progress())
        receipt = self._ended(request)
        self._executor.take_image(
            event.image_slot,
            request.size,
            finish=lambda image: (image, receipt()),
            receive=lambda made: self._taken(request, made),
        )

    def _taken(self, request: Request, made: tuple[Any, Receipt] | Exception) -> None:
        """The picture and its receipt are there."""
        if isinstance(made, Exception):
            error = GenerationError(f"the picture could not be copied, or its receipt not made: {made!r}")
            self._outputs(Failure(request_id=request.request_id, error=error))
        else:
            image, receipt = made
            self._outputs(request.result(image, self._executor.now_s(), receipt))

    def _cost_model_of(self, request: Request) -> CostModel:
        return self._cost_models[request.params.model]

    def _move(self, request: Request, state: RequestState) -> None:
        self._table.move(request, state)
        self._follow(request)
        self._outputs(request.progress())

    def _follow(self, request: Request) -> None:
        """If a request's next command is dispatched, its state says so."""
        for entry in self._in_flight.of_request(request.request_id)[:1]:
            if isinstance(entry.command, EncodePrompt) and request.state is RequestState.WAITING:
                self._table.move(request, RequestState.ENCODING)
            elif isinstance(entry.command, Denoise) and request.state is RequestState.READY:
                self._table.move(request, RequestState.DENOISING)
            elif isinstance(entry.command, Decode) and request.state is RequestState.DENOISED:
                self._table.move(request, RequestState.DECODING)

    # A request's end ----------------------------------------------------------------------------------------------

    def end(self, request: Request, error: Exception) -> None:
        """End a request without a picture."""
        if request.state is not RequestState.QUEUED:
            self._statistics.ended(self._executor.now_s())
        cancelled = isinstance(error, RequestCancelled)
        self._table.move(request, RequestState.CANCELLED if cancelled else RequestState.FAILED)
        self._ended(request)
        self._outputs(Failure(request_id=request.request_id, error=error))

    def _ended(self, request: Request) -> Callable[[], Receipt]:
        """The request is over; the answer says what it has cost."""
        facts = RequestFacts(
            request_id=request.request_id,
            model=request.params.model,
            cost_key=request.cost_key,
            degrees=tuple(request.degrees),
        )
        return self._energy.ended(facts, self._cost_models.tables, self._executor.now_s())
