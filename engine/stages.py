"""The stages of a request, in order. All but denoising are done once, on one device."""

from typing import Literal, get_args

Stage = Literal["encode", "denoise", "decode"]
STAGES: tuple[Stage, ...] = get_args(Stage)
BEFORE_STEPS: tuple[Stage, ...] = STAGES[: STAGES.index("denoise")]
AFTER_STEPS: tuple[Stage, ...] = STAGES[STAGES.index("denoise") + 1 :]
AUX_STAGES = BEFORE_STEPS + AFTER_STEPS
NEXT_STAGE: dict[Stage, Stage | None] = dict(zip(STAGES, (*STAGES[1:], None), strict=True))
AUX_FROM: dict[Stage, tuple[Stage, ...]] = {
    stage: tuple(other for other in STAGES[number:] if other in AUX_STAGES) for number, stage in enumerate(STAGES)
}
"""The stages besides denoising that a request has before it whose next one this is."""
