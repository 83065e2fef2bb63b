"""What a caller asks for (`ImageRequest`) and what comes back (`Progress`, `ImageResult`, `Failure`). Values only.

One request is one picture. What a caller may put into one, and what bounds there are, is `resolve.py`'s.
"""

from typing import Any

import msgspec

from tetrion.engine.config import EnergyMode
from tetrion.engine.energy.receipt import NOT_METERED, Receipt
from tetrion.engine.params import Params


class RequestError(ValueError):
    """A request is not acceptable; `field` names what is wrong with it, the message names the bound."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class CheapestPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What an energy budget is refused with. `degrees`: of each step; `seconds` from encode to decode on idle devices;
    `joules` as the profile has them, without the stages in `uncounted`, which it does not know; `in_time`: whether it
    meets the deadline, None if there is none."""

    joules: float
    seconds: float
    degrees: tuple[int, ...]
    uncounted: tuple[str, ...] = ()
    in_time: bool | None = None

    @property
    def text(self) -> str:
        runs = [f"{self.degrees.count(d)} steps at degree {d}" for d in dict.fromkeys(self.degrees)]
        without = f", without {' and '.join(self.uncounted)}, of which no joules are known" if self.uncounted else ""
        what = f"{self.joules:.4g} J in {self.seconds:.3g} s ({', '.join(runs)}{without})"
        if self.in_time is None:
            return f"the cheapest plan takes {what}"
        if self.in_time:
            return f"the cheapest plan that meets the deadline takes {what}"
        return f"the cheapest plan takes {what}, and none meets the deadline"


class BudgetUnmeetable(RequestError):
    """No plan that meets the deadline takes so few joules. `cheapest`: the one that takes least; of those that are late
    if all are."""

    def __init__(self, budget_j: float, cheapest: CheapestPlan) -> None:
        super().__init__("energy.budget_j", f"{budget_j:g} J cannot be met: {cheapest.text}")
        self.cheapest = cheapest


class EngineOverloaded(RuntimeError):
    """The queue is full; try again later."""


class DeadlineUnmeetable(EngineOverloaded):
    """Refused at once, since its picture would come too late. `earliest_slo_ms`: the SLO that could be met now."""

    def __init__(self, slo_ms: float, earliest_slo_ms: float) -> None:
        super().__init__(f"slo_ms: {slo_ms:g} cannot be met now, the earliest that can is {earliest_slo_ms:g}")
        self.earliest_slo_ms = earliest_slo_ms


class GenerationError(RuntimeError):
    """An accepted request could not be served (worker lost, out of memory, ...)."""


class EngineEnded(GenerationError):
    """The engine gave itself up: it could not serve, and did not expect to any more. The message says why."""


class RequestCancelled(Exception):
    """The request was cancelled before its picture was finished."""


class EnergyWish(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to spend joules on a request. `mode` None: the engine's own (`PlannerConfig.energy`). `budget_j`: the most
    joules its own work may take, as the profile has them; None: any number."""

    mode: EnergyMode | None = None
    budget_j: float | None = None


class ImageRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One picture to draw. None means the model's default (`resolve_request` fills it in). Numbers and texts of other
    libraries may be given: whole numbers by `__index__`, real ones by `__float__`, subclasses of `str`.

    `model`: the name of one that the engine serves. `negative_prompt`, `true_cfg_scale`: of classifier-free guidance,
    where the model takes them (`ModelSpec.inputs`). `slo_ms`: deadline relative to arrival, in milliseconds; None = no
    deadline. `priority`: larger goes first among equal deadlines. `weight`: worth of meeting this deadline relative to
    others; `tenant`: on whose behalf, for weights that the operator gives. `force_degrees`: the degree of each step,
    for tests and experiments; its last entry holds for the remaining steps. `energy`: see `EnergyWish`.
    """

    prompt: str
    negative_prompt: str | None = None
    model: str | None = None
    width: int | None = None
    height: int | None = None
    num_steps: int | None = None
    guidance: float | None = None
    true_cfg_scale: float | None = None
    seed: int | None = None
    slo_ms: float | None = None
    priority: int = 0
    weight: float = 1.0
    tenant: str = ""
    force_degrees: tuple[int, ...] = ()
    energy: EnergyWish = EnergyWish()
    request_id: str = ""


class ResolvedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request that a model accepts. `asked`: what the caller asked for, defaults filled in; `params`: how it is
    drawn. Whoever carries a request out reads a parameter from `params`, and from `asked` what is not about drawing
    (the prompts, deadline, priority, id …)."""

    asked: ImageRequest
    params: Params


class ImageResult(msgspec.Struct, frozen=True, kw_only=True):
    """A finished picture. `image`: numpy uint8 RGB [height, width, 3]. `degrees`: the degree used at each step.
    `latency_s` from arrival to finish; `encode_s`, `denoise_s`, `decode_s` are time on devices; `slo_met` is None
    without an SLO. `energy`: what it cost in joules."""

    request_id: str
    image: Any
    prompt: str
    width: int
    height: int
    num_steps: int
    seed: int
    degrees: tuple[int, ...]
    num_text_tokens: int
    latency_s: float
    queue_s: float
    encode_s: float
    denoise_s: float
    decode_s: float
    slo_met: bool | None
    energy: Receipt = NOT_METERED


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """`state` is the request's state (lower case), `step_index` counts finished steps, `degree` that of the last."""

    request_id: str
    state: str
    step_index: int
    num_steps: int
    degree: int


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A request that ended without a picture: `error` is a GenerationError or RequestCancelled."""

    request_id: str
    error: Exception


Output = Progress | ImageResult | Failure
"""Everything the engine says of a request."""
