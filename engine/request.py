"""What a caller asks for (`ImageRequest`) and what comes back (`Progress`, `ImageResult`, `Failure`). Values only.

One request is one picture. `resolve_request` is the one place where bounds are checked.
"""

import secrets
import uuid
from typing import Any, get_args

import msgspec

from tetrion.engine.config import EnergyMode
from tetrion.engine.energy.receipt import NOT_METERED, Receipt
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.params import Params
from tetrion.engine.shape import StepShape

MAX_PROMPT_CHARS = 32_000
MAX_SEED = 2**63 - 1
MAX_STEPS = 1000
RANDOM_SEEDS = 2**32
"""Seeds drawn for requests that carry none are below this: short enough to be written down."""
MAX_BUDGET_J = 1e9


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


class RequestCancelled(Exception):
    """The request was cancelled before its picture was finished."""


class EnergyWish(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to spend joules on a request. `mode` None: the engine's own (`PlannerConfig.energy`). `budget_j`: the most
    joules its own work may take, as the profile has them; None: any number."""

    mode: EnergyMode | None = None
    budget_j: float | None = None


class ImageRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One picture to draw. None means the model's default (`resolve_request` fills it in).

    `slo_ms`: deadline relative to arrival, in milliseconds; None = no deadline. `priority`: larger goes first among
    equal deadlines. `weight`: worth of meeting this deadline relative to others; `tenant`: on whose behalf, for weights
    that the operator gives. `force_degrees`: the degree of each
    step, for tests and experiments; its last entry holds for the remaining steps. `energy`: see `EnergyWish`.
    """

    prompt: str
    width: int | None = None
    height: int | None = None
    num_steps: int | None = None
    guidance: float | None = None
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


def resolve_request(request: ImageRequest, spec: ModelSpec, num_devices: int) -> ResolvedRequest:
    """`request` with every default filled in, checked against the model. A request without a seed gets a random one, a
    request without an id a new one.

    Raises RequestError.
    """
    if not request.prompt.strip():
        raise RequestError("prompt", "must not be empty")
    if len(request.prompt) > MAX_PROMPT_CHARS:
        raise RequestError("prompt", f"has {len(request.prompt)} characters, at most {MAX_PROMPT_CHARS} are allowed")
    width = spec.default_width if request.width is None else request.width
    height = spec.default_height if request.height is None else request.height
    for field, value in (("width", width), ("height", height)):
        if not spec.is_side(value):
            raise RequestError(
                field,
                f"must be a multiple of {spec.size_multiple} from {spec.min_size} to {spec.max_size}"
                f" for model {spec.name!r}, got {value}",
            )
    num_steps = spec.num_steps if request.num_steps is None else request.num_steps
    if not 1 <= num_steps <= MAX_STEPS:
        raise RequestError("num_steps", f"must be from 1 to {MAX_STEPS}, got {num_steps}")
    guidance = spec.guidance if request.guidance is None else request.guidance
    if not 0 <= guidance <= 100:
        raise RequestError("guidance", f"must be from 0 to 100, got {guidance}")
    if request.seed is not None and not 0 <= request.seed <= MAX_SEED:
        raise RequestError("seed", f"must be from 0 to {MAX_SEED}, got {request.seed}")
    if request.slo_ms is not None and not 0 < request.slo_ms <= 86_400_000:
        raise RequestError("slo_ms", f"must be above 0 and at most 86400000 (a day), got {request.slo_ms}")
    if not -1_000_000 <= request.priority <= 1_000_000:
        raise RequestError("priority", f"must be from -1000000 to 1000000, got {request.priority}")
    if not 0 < request.weight <= 1e6:
        raise RequestError("weight", f"must be above 0 and at most 1000000, got {request.weight}")
    _check_energy(request)
    shape = StepShape(
        width=width, height=height, image=spec.num_image_tokens(width, height), text=(spec.max_text_tokens,)
    )
    legal = spec.legal_degrees(num_devices, shape.num_branches)
    for degree in request.force_degrees:
        if degree not in legal:
            raise RequestError("force_degrees", f"{degree} is not one of {', '.join(map(str, legal))}")
    if len(request.force_degrees) > num_steps:
        raise RequestError("force_degrees", f"has {len(request.force_degrees)} entries for {num_steps} steps")
    asked = msgspec.structs.replace(
        request,
        width=width,
        height=height,
        num_steps=num_steps,
        guidance=guidance,
        seed=secrets.randbelow(RANDOM_SEEDS) if request.seed is None else request.seed,
        request_id=request.request_id or uuid.uuid4().hex,
    )
    assert asked.seed is not None
    params = Params(model=spec.name, shape=shape, num_steps=num_steps, guidance=guidance, seed=asked.seed)
    return ResolvedRequest(asked=asked, params=params)


def _check_energy(request: ImageRequest) -> None:
    wish, modes = request.energy, get_args(EnergyMode)
    if wish.mode is not None and wish.mode not in modes:
        raise RequestError("energy.mode", f"must be one of {', '.join(modes)}, got {wish.mode!r}")
    if wish.budget_j is not None and not 0 < wish.budget_j <= MAX_BUDGET_J:
        raise RequestError("energy.budget_j", f"must be above 0 and at most {MAX_BUDGET_J:g}, got {wish.budget_j}")
    if request.force_degrees and wish != EnergyWish():
        raise RequestError("energy", "cannot be given with force_degrees, which leave nothing to choose")
