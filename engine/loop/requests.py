"""The life of a request inside the engine. `RequestTable` owns it (request_table.py).

    QUEUED ──▶ WAITING ──▶ ENCODING ──▶ READY ⇄ DENOISING ──▶ DENOISED ──▶ DECODING ──▶ FINISHED
       │          │            │          │         │            │            │
       └──────────┴────────────┴──────────┴────┬────┴────────────┴────────────┘
                                               ▼
                                     FAILED or CANCELLED          (a lost worker: back to WAITING, READY or DENOISED)
                                                                  (set aside: back to QUEUED)

QUEUED requests own no slot; from WAITING on a request owns a state slot in every worker's slab. A slot can be taken
back from a request that waits for its next command: it is QUEUED again, with the steps that it has done, and goes on
from there once it gets another.
"""

import enum
from typing import Any

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
    _S.WAITING: frozenset({_S.ENCODING, _S.QUEUED, _S.FAILED, _S.CANCELLED}),
    _S.ENCODING: frozenset({_S.READY, _S.DENOISED, _S.WAITING, _S.FAILED, _S.CANCELLED}),
    _S.READY: frozenset({_S.DENOISING, _S.WAITING, _S.QUEUED, _S.FAILED, _S.CANCELLED}),
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
    not be taken for it. `num_stalls`: how often a device was overdue with it. `stage_s`: time on devices. `spent_j`:
    joules of all that was dispatched for it, lost attempts included, as far as the profile knows them. `cancelled`: it
    ends once nothing is in flight for it, with `error` if there is one. `saved`: its state, of a request that has steps
    behind it and no slot. `is_feasible`: it has a deadline and can still meet it, as far as `RequestTable` knows.

    `asked` is what the caller asked for, `params` how it is drawn, `cost_key` the text of its `CostKey`. `deadline_s`
    is the caller's; `engine_deadline_s`, which the engine must keep, leaves `deliver_s` for the delivery.
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
        "deliver_s",
        "engine_deadline_s",
        "error",
        "holders",
        "image",
        "is_feasible",
        "is_retried",
        "num_stalls",
        "num_text_tokens",
        "params",
        "planned_chunk_index",
        "planned_holders",
        "planned_stage",
        "planned_state_id",
        "planned_step_index",
        "saved",
        "slot",
        "spent_j",
        "stage_s",
        "started_s",
        "state",
        "state_id",
        "step_index",
    )

    def __init__(self, resolved: ResolvedRequest, arrival_s: float, deliver_s: float = 0.0) -> None:
        asked, params = resolved.asked, resolved.params
        self.asked = asked
        self.params = params
        self.cost_key = params.shape.cost_key
        self.arrival_s = arrival_s
        self.deadline_s = None if asked.slo_ms is None else arrival_s + asked.slo_ms / 1000
        self.deliver_s = deliver_s
        self.engine_deadline_s = None if self.deadline_s is None else self.deadline_s - deliver_s
        self.state = RequestState.QUEUED
        self.is_feasible = False
        self.slot = -1
        self.attempts = self.num_stalls = 0
        self.cancelled = False
        self.error: Exception | None = None
        self.started_s: float | None = None
        self.spent_j = 0.0
        self.state_id = self.planned_state_id = 0
        self.step_index = self.planned_step_index = 0
        self.chunk_index = self.planned_chunk_index = 0
        self.is_retried = False
        self.saved: Any = None
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
    def inputs(self) -> tuple[Any, ...]:
        """What it brings to be encoded, as `params.shape.inputs` says: uint8 arrays. They are kept until it ends: what
        is lost with all holders is encoded again."""
        mask = self.asked.mask
        pictures = tuple([picture.pixels for picture in self.asked.pictures])
        return pictures if mask is None else (*pictures, mask[..., None])

    @property
    def input_bytes(self) -> int:
        return sum([array.nbytes for array in self.inputs])

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

    @property
    def pixels(self) -> int:
        width, height = self.size
        return width * height * self.params.shape.frames

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
