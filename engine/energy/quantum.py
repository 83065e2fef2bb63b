"""What a GPU did from when to when, and for whom (`Quantum`). A value."""

from typing import Literal, NamedTuple

Phase = Literal["encode", "denoise", "decode"]
PHASES: tuple[Phase, ...] = ("encode", "denoise", "decode")


class Share(NamedTuple):
    """Where joules go: a phase of a request of some size (pixels)."""

    request_id: str
    phase: Phase
    size: tuple[int, int]


class Quantum(NamedTuple):
    """One stage of one request on one GPU. `weight`: image tokens × forward passes; where several run at once it
    decides how they share the power. `model_j`: what the profile says it takes on this GPU, None if it does not say."""

    start_s: float
    end_s: float
    share: Share
    weight: float
    model_j: float | None = None

    def per_second(self, amount: float) -> float:
        return amount / (self.end_s - self.start_s)
