"""A vector that belongs to the request, or a table of one vector a step, of which a counter in device memory picks one.

Owns the check that modulation vectors fit; knows no kernel. With a table, a CUDA graph replays any step unchanged.
"""

import torch
from torch import Tensor


def step_row(values: Tensor, width: int, step: Tensor | None) -> tuple[Tensor, int]:
    """`values` and its row stride. [width] without a step counter, [steps, width] with one (int32 [1])."""
    assert values.shape[-1] == width and values.stride(-1) == 1, f"{tuple(values.shape)} for rows of {width}"
    if step is None:
        assert values.dim() == 1, f"{tuple(values.shape)} is a table, but no step is given"
        return values, 0
    assert values.dim() == 2 and step.dtype == torch.int32, f"{tuple(values.shape)}, step of {step.dtype}"
    return values, values.stride(0)
