"""Wall-clock learning-rate schedule and the training log (one JSON object a line on standard output)."""

import json
import time

import torch


class Clock:
    """A time budget; `rate` warms up over steps, holds, then falls linearly to zero at the budget's end."""

    def __init__(self, seconds: float, warmup_steps: int, hold: float = 0.3):
        self._began = time.monotonic()
        self._seconds = seconds
        self._warmup_steps = warmup_steps
        self._hold = hold

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, 0..1."""
        return min(1.0, (time.monotonic() - self._began) / self._seconds)

    @property
    def is_over(self) -> bool:
        return self.progress >= 1.0

    def rate(self, step: int) -> float:
        """Factor on the peak learning rate."""
        fall = min(1.0, (1.0 - self.progress) / (1.0 - self._hold))
        return min(1.0, (step + 1) / self._warmup_steps) * max(fall, 0.002)


def log(stage: str, **values) -> None:
    """Print one line; tensors of one element become numbers."""
    plain = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in plain.items()}
    print(json.dumps({"stage": stage, **rounded}), flush=True)
