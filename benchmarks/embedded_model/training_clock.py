"""Wall-clock learning-rate schedule and the training log (one JSON object a line on standard output)."""

import json
import time

import torch

from benchmarks.embedded_model import processes


class Clock:
    """A time budget; `rate` warms up over steps, holds, then falls linearly to zero at the budget's end.

    The schedule goes from the share `done` to 1 in `seconds`. `tick` reads the time once a step. With `is_shared`, all
    processes see the first one's, so that none takes a step more than the others.
    """

    def __init__(
        self, seconds: float, warmup_steps: int, hold: float = 0.3, is_shared: bool = False, done: float = 0.0
    ):
        self._began = time.monotonic()
        self._seconds = seconds
        self._warmup_steps = warmup_steps
        self._hold = hold
        self._is_shared = is_shared
        self._done = done
        self.progress = done
        """Share of the schedule that was done at the last tick, 0..1."""

    def tick(self) -> bool:
        """True while there is time for another step."""
        spent = (time.monotonic() - self._began) / self._seconds
        progress = min(1.0, self._done + (1.0 - self._done) * spent)
        self.progress = processes.shared(progress) if self._is_shared else progress
        return self.progress < 1.0

    def rate(self, step: int) -> float:
        """Factor on the peak learning rate."""
        fall = min(1.0, (1.0 - self.progress) / (1.0 - self._hold))
        return min(1.0, (step + 1) / self._warmup_steps) * max(fall, 0.002)


def log(stage: str, **values) -> None:
    """Print one line, in the first process; tensors of one element become numbers."""
    if processes.rank != 0:
        return
    plain = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in plain.items()}
    print(json.dumps({"stage": stage, **rounded}), flush=True)
