"""How a request is to be drawn, defaults settled (`Params`). A value, which travels whole into its commands."""

import msgspec

from tetrion.engine.shape import StepShape

NO_CFG = 1.0
"""The scale of classifier-free guidance that changes nothing."""


class Params(msgspec.Struct, frozen=True, kw_only=True):
    """`model`: its name. `guidance`: what the model's family takes it to be (an input of the network, or the scale of
    its own classifier-free guidance); `true_cfg_scale`: of classifier-free guidance beside that, `NO_CFG` for none.
    `num_steps` are run; where a picture is begun with, `skipped_steps` of the schedule come before them."""

    model: str
    shape: StepShape
    num_steps: int
    skipped_steps: int = 0
    guidance: float
    true_cfg_scale: float = NO_CFG
    seed: int
