"""What a GPU did from when to when, and for whom (`Quantum`). A value."""

from typing import NamedTuple

from tetrion.engine.stages import Stage


class Share(NamedTuple):
    """Where joules go: a stage of a request, drawn by `model` at the cost of `cost_key`."""

    request_id: str
    phase: Stage
    model: str
    cost_key: str


class Quantum(NamedTuple):
    """One stage of one request on one GPU. `weight`: image rows × forward passes; where several run at once it
    decides how they share the power. `model_j`: what the profile says it takes on this GPU, None if it does not say."""

    start_s: float
    end_s: float
    share: Share
    weight: float
    model_j: float | None = None

    def per_second(self, amount: float) -> float:
        return amount / (self.end_s - self.start_s)
