"""What a caller asks for (`ImageRequest`) and what comes back (`Progress`, `ImageResult`, `Failure`). Values only.

One request is one picture. What a caller may put into one, and what bounds there are, is `resolve.py`'s.
"""

import io
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from tetrion.engine.config import EnergyMode
from tetrion.engine.params import Params

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_ATTEMPTS = 3
"""So many workers may die at a request's own commands before that ends it."""


JOULES_PER_WH = 3600.0

Delivery = Literal["png", "jpeg", "webp"]
"""What a caller makes of a picture before he hands it on: a file or an answer of this format."""


class PhaseJoules(msgspec.Struct, frozen=True, kw_only=True):
    """Active joules by phase; None: none was metered in it."""

    encode: float | None = None
    denoise: float | None = None
    decode: float | None = None


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """Joules of one request on all of its GPUs. A field that is not known is None, and `reasons` says why.

    `active_j`: while its own work ran. `idle_share_j`: its part of what idle GPUs drew while it was under way, divided
    equally among the requests of that moment. `wh`: both together, in watt-hours. `method`: the meter. `uncertainty_j`:
    half-width around `active_j`: what power samples were off by (twice the root mean square) where no counter has
    closed the account yet, and a reading's distance at both ends. `degrees`: GPUs at each step. `fastest_plan_j`: what
    the fastest degrees would have taken; `saved_j`: what its own saved against them; both by the profile's joules.
    `co2e_g`: grams, if an intensity is set up.
    """

    method: str = "none"
    active_j: float | None = None
    idle_share_j: float | None = None
    phases: PhaseJoules | None = None
    wh: float | None = None
    uncertainty_j: float | None = None
    degrees: tuple[int, ...] = ()
    fastest_plan_j: float | None = None
    saved_j: float | None = None
    co2e_g: float | None = None
    reasons: dict[str, str] = {}


def unmetered(reason: str, degrees: tuple[int, ...] = (), method: str = "none", has_intensity: bool = False) -> Receipt:
    """A receipt without joules. `has_intensity`: one of carbon is set up, so that `co2e_g` lacks a reason, too."""
    names = ["active_j", "idle_share_j", "phases", "wh", "uncertainty_j", "fastest_plan_j", "saved_j"]
    names += ["co2e_g"] * has_intensity
    return Receipt(method=method, degrees=degrees, reasons=dict.fromkeys(names, reason))


def with_saving(receipt: Receipt, saved_j: float) -> Receipt:
    """A receipt without joules that knows what was saved all the same: the profile says it."""
    reasons = {name: reason for name, reason in receipt.reasons.items() if name != "saved_j"}
    return msgspec.structs.replace(receipt, saved_j=saved_j, reasons=reasons)


NOT_METERED = unmetered("the engine that drew this has no energy account")


class EnergyOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to spend joules on a request. `mode` None: the engine's own (`HorizonOptions.energy`). `budget_j`: the most
    joules its own work may take, as the profile has them; None: any number."""

    mode: EnergyMode | None = None
    budget_j: float | None = None


class ImageRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One picture to draw. None means the default, in every field but the prompt (`resolve_request` fills it in).
    Numbers and texts of other libraries may be given: whole numbers by `__index__`, real ones by `__float__`,
    subclasses of `str`; a real number that is whole (3.0) does for a whole one.

    `model`: a name of one that the engine serves; None: its first. `negative_prompt`, `true_cfg_scale`: of
    classifier-free guidance, where the model takes them (`ModelSpec.inputs`), as `pictures`, `mask` and `strength`:
    pictures to work from, each a PIL image, an array (uint8 [height, width, 3] or 4), a file's bytes or its path; a
    picture of where the first one is drawn anew; how far the result goes from it, up to 1. Without a size the result
    has that of the first picture, as far as the model draws it. `slo_ms`: deadline relative to arrival, in
    milliseconds; None = no deadline. `priority`: larger goes first among equal deadlines. `weight`: worth of meeting
    this deadline relative to others; `tenant`: on whose behalf, for weights that the operator gives and for shares of
    the slots (`loop/shares.py`); `user`: within the tenant, which its users share likewise. `force_degrees`: the degree
    of each step, for tests and experiments; its last entry holds for the remaining steps. `energy`: see
    `EnergyOptions`. `delivery`: what will be done with the picture before the deadline counts as met, which is planned
    for and which the caller reports (`AsyncEngine.delivered`); None: nothing, it is handed over in this process.
    """

    prompt: str
    negative_prompt: str | None = None
    model: str | None = None
    width: int | None = None
    height: int | None = None
    num_steps: int | None = None
    guidance: float | None = None
    true_cfg_scale: float | None = None
    pictures: tuple[Any, ...] = ()
    mask: Any = None
    strength: float | None = None
    seed: int | None = None
    slo_ms: float | None = None
    priority: int = 0
    weight: float = 1.0
    tenant: str = ""
    user: str = ""
    force_degrees: tuple[int, ...] = ()
    energy: EnergyOptions = EnergyOptions()
    delivery: Delivery | None = None
    request_id: str = ""


class ResolvedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request that a model accepts. `asked`: what the caller asked for, defaults filled in; `params`: how it is
    drawn. Whoever carries a request out reads a parameter from `params`, and from `asked` what is not about drawing
    (the prompts, pictures, deadline, priority, id …). Its pictures are `engine.pictures.Picture`s of the sizes in
    `params.shape`, its mask an array."""

    asked: ImageRequest
    params: Params


class ImageResult(msgspec.Struct, frozen=True, kw_only=True):
    """A finished picture. `image`: numpy uint8 RGB [height, width, 3]. `model`: the name of the one that drew it.
    `degrees`: the degree used at each step.
    `latency_s` from arrival to finish; `encode_s`, `denoise_s`, `decode_s` are time on devices; `slo_met` is None
    without an SLO, and does not know of a delivery (`Delivered` does). `energy`: what it cost in joules."""

    request_id: str
    model: str
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

    def __repr__(self) -> str:
        return (
            f"ImageResult({self.request_id!r}, {self.model} {self.width}x{self.height}, {self.num_steps} steps,"
            f" seed {self.seed}, {self.latency_s:.3f} s)"
        )

    @property
    def pil(self) -> "Image":
        """The picture as a PIL image."""
        from PIL import Image

        return Image.fromarray(self.image)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the picture in the format that the name's ending says (PNG, JPEG, WebP …), over what is there. Raises
        ValueError for an ending that is none, OSError."""
        self.pil.save(path)

    def _repr_png_(self) -> bytes:
        """What notebooks show."""
        buffer = io.BytesIO()
        self.pil.save(buffer, "PNG")
        return buffer.getvalue()


class Delivered(msgspec.Struct, frozen=True, kw_only=True):
    """A picture whose last byte the caller has handed on. `latency_s` from arrival until then, `deliver_s` of it after
    the engine was done; `slo_met` is None without an SLO."""

    request_id: str
    tenant: str
    latency_s: float
    deliver_s: float
    slo_met: bool | None


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
