"""The life of a request inside the engine, and the table that owns it.

    QUEUED ──▶ WAITING ──▶ ENCODING ──▶ READY ⇄ DENOISING ──▶ DENOISED ──▶ DECODING ──▶ FINISHED
       │          │            │          │         │            │            │
       └──────────┴────────────┴──────────┴────┬────┴────────────┴────────────┘
                                               ▼
                                     FAILED or CANCELLED          (a lost worker: back to WAITING, READY or DENOISED)

QUEUED requests hold nothing; from WAITING on a request owns a state slot in every worker's slab. `RequestTable` is the
only owner of these states; it knows nothing of processes, planners or torch.
"""

import enum
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from tetrion.engine.errors import EngineOverloaded, RequestError
from tetrion.engine.request import MAX_ATTEMPTS, ImageResult, Progress, Receipt, ResolvedRequest
from tetrion.engine.stages import AFTER_STEPS, STAGES, Stage


class RequestState(enum.Enum):
    QUEUED = "queued"
    WAITING = "waiting"
    ENCODING = "encoding"
    READY = "ready"
    DENOISING = "denoising"
    DENOISED = "denoised"
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


_S = RequestState
LEGAL_TRANSITIONS: dict[RequestState, frozenset[RequestState]] = {
    _S.QUEUED: frozenset({_S.WAITING, _S.FAILED, _S.CANCELLED}),
    _S.WAITING: frozenset({_S.ENCODING, _S.FAILED, _S.CANCELLED}),
    _S.ENCODING: frozenset({_S.READY, _S.DENOISED, _S.WAITING, _S.FAILED, _S.CANCELLED}),
    _S.READY: frozenset({_S.DENOISING, _S.WAITING, _S.FAILED, _S.CANCELLED}),
    _S.DENOISING: frozenset({_S.READY, _S.DENOISED, _S.WAITING, _S.FAILED, _S.CANCELLED}),
    _S.DENOISED: frozenset({_S.DECODING, _S.WAITING, _S.FAILED, _S.CANCELLED}),
    _S.DECODING: frozenset({_S.FINISHED, _S.DENOISED, _S.WAITING, _S.FAILED, _S.CANCELLED}),
    _S.FINISHED: frozenset(),
    _S.FAILED: frozenset(),
    _S.CANCELLED: frozenset(),
}
TERMINAL_STATES = frozenset(state for state, following in LEGAL_TRANSITIONS.items() if not following)
STAGE_STATES: dict[Stage, tuple[RequestState, RequestState]] = {
    "encode": (_S.WAITING, _S.ENCODING),
    "denoise": (_S.READY, _S.DENOISING),
    "decode": (_S.DENOISED, _S.DECODING),
}
"""The states of a request that is ready for a stage, and that is in it."""


class Request:
    """One accepted request while it lives. Written by `RequestTable` (state, slot) and `EngineLoop` (progress).

    `step_index` and `chunk_index` count finished steps and chunks, `holders` are the devices whose slot has the state
    as it is then, as `state_id`; `planned_…`: the same with all that was dispatched; `planned_stage` comes after it
    (None: that was the last). `is_retried`: what was dispatched before came to nothing, so that what comes next must
    not be taken for it. `stage_s`: time on devices. `spent_j`: joules of all that was dispatched
    for it, lost attempts included, as far as the profile knows them. `cancelled`: it ends once nothing is in flight for
    it, with `error` if there is one.

    `asked` is what the caller asked for, `params` how it is drawn, `cost_key` the text of its `CostKey`.
    """

    __slots__ = (
        "arrival_s",
        "asked",
        "attempts",
        "cancelled",
        "chunk_index",
        "cost_key",
        "deadline_s",
        "degrees",
        "error",
        "holders",
        "image",
        "is_retried",
        "num_text_tokens",
        "params",
        "planned_chunk_index",
        "planned_holders",
        "planned_stage",
        "planned_state_id",
        "planned_step_index",
        "slot",
        "spent_j",
        "stage_s",
        "started_s",
        "state",
        "state_id",
        "step_index",
    )

    def __init__(self, resolved: ResolvedRequest, arrival_s: float) -> None:
        asked, params = resolved.asked, resolved.params
        self.asked = asked
        self.params = params
        self.cost_key = params.shape.cost_key
        self.arrival_s = arrival_s
        self.deadline_s = None if asked.slo_ms is None else arrival_s + asked.slo_ms / 1000
        self.state = RequestState.QUEUED
        self.slot = -1
        self.attempts = 0
        self.cancelled = False
        self.error: Exception | None = None
        self.started_s: float | None = None
        self.spent_j = 0.0
        self.state_id = self.planned_state_id = 0
        self.step_index = self.planned_step_index = 0
        self.chunk_index = self.planned_chunk_index = 0
        self.is_retried = False
        self.holders: tuple[int, ...] = ()
        self.planned_holders: tuple[int, ...] = ()
        self.planned_stage: Stage | None = STAGES[0]
        self.degrees: list[int] = []
        self.num_text_tokens = 0
        self.stage_s: dict[Stage, float] = dict.fromkeys(STAGES, 0.0)

    @property
    def is_on_probation(self) -> bool:
        """It may be the cause of what has happened to devices: it runs alone from now on."""
        return self.attempts == MAX_ATTEMPTS - 1

    @property
    def next_stage(self) -> Stage:
        """Of a request whose state is on devices."""
        return "denoise" if self.step_index < self.num_steps else AFTER_STEPS[0]

    def forget_dispatched(self) -> RequestState:
        """What was dispatched and is not finished has come to nothing: it is to be done again. It goes on from
        `holders`; if there are none, from what is saved. Returns the state that it is in now."""
        self.planned_step_index, self.planned_chunk_index = self.step_index, self.chunk_index
        self.planned_state_id, self.planned_holders = self.state_id, self.holders
        self.is_retried = True
        self.planned_stage = self.next_stage if self.holders else STAGES[0]
        return STAGE_STATES[self.planned_stage][0]

    @property
    def request_id(self) -> str:
        return self.asked.request_id

    @property
    def num_steps(self) -> int:
        return self.params.num_steps

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.params.shape.size

    def progress(self) -> Progress:
        return Progress(
            request_id=self.request_id,
            state=self.state.value,
            step_index=self.step_index,
            num_steps=self.num_steps,
            degree=self.degrees[-1] if self.degrees else 0,
        )

    def result(self, image: Any, finished_s: float, energy: Receipt) -> ImageResult:
        width, height = self.size
        assert self.started_s is not None
        return ImageResult(
            request_id=self.request_id,
            model=self.params.model,
            image=image,
            prompt=self.asked.prompt,
            width=width,
            height=height,
            num_steps=self.num_steps,
            seed=self.params.seed,
            degrees=tuple(self.degrees),
            num_text_tokens=self.num_text_tokens,
            latency_s=finished_s - self.arrival_s,
            queue_s=self.started_s - self.arrival_s,
            encode_s=self.stage_s["encode"],
            denoise_s=self.stage_s["denoise"],
            decode_s=self.stage_s["decode"],
            slo_met=None if self.deadline_s is None else finished_s <= self.deadline_s,
            energy=energy,
        )


class RequestTable:
    """All living requests and the state slots they own. A slot number is the same in every worker's slab."""

    def __init__(
        self,
        num_slots: int,
        max_queued: int,
        patience_s: float,
        is_patient: Callable[[Request], bool] = lambda request: False,
    ) -> None:
        """`is_patient`: requests that may be kept waiting for long while they own a slot. They own at most half of the
        slots, so that others find one."""
        self._num_slots = num_slots
        self._is_patient = is_patient
        self._max_queued = max_queued
        self._patience_s = patience_s
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._withheld: Counter[int] = Counter()
        self._free_once_back: set[int] = set()
        self._queued: dict[str, Request] = {}
        self._admitted: dict[str, Request] = {}
        self._cancelled: dict[str, Request] = {}
        self._changed: set[str] = set()

    def __len__(self) -> int:
        return len(self._queued) + len(self._admitted)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._queued or request_id in self._admitted

    @property
    def num_queued(self) -> int:
        return len(self._queued)

    def get(self, request_id: str) -> Request | None:
        return self._admitted.get(request_id) or self._queued.get(request_id)

    def get_admitted(self, request_id: str) -> Request | None:
        """The request if it owns a slot."""
        return self._admitted.get(request_id)

    def admitted(self) -> Iterator[Request]:
        """Requests that own a slot, in order of admission."""
        return iter(self._admitted.values())

    def queued(self) -> Iterator[Request]:
        """Requests that wait for a slot, in order of arrival."""
        return iter(self._queued.values())

    def oldest_queued(self) -> Request | None:
        """Of those that wait for a slot, the first to arrive."""
        return next(iter(self._queued.values()), None)

    def cancelled(self) -> list[Request]:
        """Living requests that were cancelled."""
        return list(self._cancelled.values())

    def mark_changed(self, request: Request) -> None:
        """Whoever writes a request's progress without `move`, with nothing in flight for it, says so."""
        self._changed.add(request.request_id)

    def take_changed(self) -> set[str]:
        """Ids of requests that have moved, ended or been cancelled since the last call."""
        changed, self._changed = self._changed, set()
        return changed

    def all(self) -> list[Request]:
        return [*self._admitted.values(), *self._queued.values()]

    def add(self, request: Request) -> None:
        """Queue a new request. Raises EngineOverloaded, or RequestError for an id that is in use."""
        if request.request_id in self:
            raise RequestError("request_id", f"{request.request_id!r} is in use")
        if len(self._queued) >= self._max_queued:
            raise EngineOverloaded(f"{len(self._queued)} requests are queued already (max_queued)")
        self._queued[request.request_id] = request

    def cancel(self, request: Request, error: Exception | None = None) -> None:
        """Note that nobody wants it any more, or that it has come to an `error`; it ends once nothing is in flight for
        it."""
        request.cancelled = True
        request.error = request.error or error
        self._cancelled[request.request_id] = request
        self.mark_changed(request)

    def admit(self) -> list[Request]:
        """Give slots to queued requests, earliest deadline first; without one, `patience_s` after arrival counts.
        Returns those that got one."""
        if not (self._free_slots and self._queued):
            return []
        order = sorted(
            self._queued.values(),
            key=lambda r: (r.deadline_s or r.arrival_s + self._patience_s, -r.asked.priority, r.request_id),
        )
        admitted = self._who_gets_slots(order)
        for request in admitted:
            del self._queued[request.request_id]
            self._admitted[request.request_id] = request
            request.slot = self._free_slots.pop()
            self.move(request, RequestState.WAITING)
        return admitted

    def _who_gets_slots(self, order: list[Request]) -> list[Request]:
        """The first in `order` that there are slots for."""
        chosen: list[Request] = []
        num_free, room = len(self._free_slots), None
        for request in order:
            if len(chosen) == num_free:
                break
            if self._is_patient(request):
                if room is None:
                    room = max(1, self._num_slots // 2) - sum(map(self._is_patient, self._admitted.values()))
                if room <= 0:
                    continue
                room -= 1
            chosen.append(request)
        return chosen

    def move(self, request: Request, state: RequestState) -> None:
        """Change a request's state; a terminal state frees its slot and forgets it."""
        assert state in LEGAL_TRANSITIONS[request.state], f"{request.state} → {state}"
        request.state = state
        self.mark_changed(request)
        if state in TERMINAL_STATES:
            self._queued.pop(request.request_id, None)
            self._cancelled.pop(request.request_id, None)
            if self._admitted.pop(request.request_id, None) is not None:
                self._release(request.slot)
                request.slot = -1

    # Slots that somebody may still write to -----------------------------------------------------------------------

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def withhold(self, slot: int) -> None:
        """Nobody is given this slot until `give_back` was called as often."""
        self._withheld[slot] += 1

    def give_back(self, slot: int) -> None:
        self._withheld[slot] -= 1
        if not self._withheld[slot]:
            del self._withheld[slot]
            if slot in self._free_once_back:
                self._free_once_back.discard(slot)
                self._free_slots.append(slot)

    def change_slot(self, request: Request) -> None:
        """Give the request another slot, of which there must be one."""
        self._release(request.slot)
        request.slot = self._free_slots.pop()

    def _release(self, slot: int) -> None:
        if slot in self._withheld:
            self._free_once_back.add(slot)
        else:
            self._free_slots.append(slot)
