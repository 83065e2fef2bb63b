"""The options of the policy `horizon`, which admission and energy modes follow too."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from tetrion.engine.config import EnergyMode, PlannerConfig, PositiveFloat, PositiveInt


class HorizonOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`drop`: whom to give up first when deadlines cannot all be met: "work", the one with most GPU-seconds left; or
    "fraction", the one with the largest share of its own steps left, whatever its size (each per unit of weight).
    `late_worth`: what left-over devices are worth to late requests and those without a deadline, where widening what is
    on time is worth 1: more of it finishes late work sooner, and costs deadlines.
    `max_candidates`: so many of the most urgent requests are weighed against each other; None: one a device, at least
    48.
    `energy`: the mode of requests that name none (see `energy_mode.py`). `j_per_s`: in mode "balanced", what a second
    earlier may cost. `extra_j`: in mode "least-energy", by what share idle devices may raise a step's joules.
    """

    drop: Literal["work", "fraction"] = "work"
    late_worth: Annotated[float, Meta(ge=0, le=100)] = 0.75
    max_candidates: PositiveInt | None = None
    energy: EnergyMode = "fastest"
    j_per_s: PositiveFloat = 200.0
    extra_j: Annotated[float, Meta(ge=0, le=10)] = 0.0


DEFAULTS = HorizonOptions()


def horizon_options(config: PlannerConfig) -> HorizonOptions:
    """Those of a config that the registry has read (`with_options`); the defaults if it is another policy's."""
    if isinstance(config.options, HorizonOptions):
        return config.options
    assert not (config.policy == "horizon" and config.options), "options that nobody has read"
    return DEFAULTS
