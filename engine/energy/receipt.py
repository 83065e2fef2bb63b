"""What one picture cost (`Receipt`): a value that goes with the result, into responses, manifests and reports."""

import msgspec

JOULES_PER_WH = 3600.0


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
