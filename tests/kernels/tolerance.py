"""How far a kernel's result may be from the fp32 reference: the one place that says so."""

import torch
from torch import Tensor

LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
TRUNCATION_FACTOR = 2  # Triton's interpreter cuts fp32 off to bf16 where a GPU rounds to nearest
ROW_FACTOR = 4


def relative_error(out: Tensor, reference: Tensor) -> float:
    """‖out − ref‖ / ‖ref‖ over everything, in fp64."""
    out, reference = out.double(), reference.double()
    return ((out - reference).norm() / reference.norm()).item()


def assert_close(out: Tensor, reference: Tensor) -> None:
    """The relative error is within the limit of `out`'s dtype; that of each row (last dimension) within four times it.

    Rows count too, so that a single wrong one is not lost in the sum; weak rows are measured against the average row.
    """
    assert out.shape == reference.shape, f"{tuple(out.shape)} instead of {tuple(reference.shape)}"
    truncated = out.dtype == torch.bfloat16 and out.device.type == "cpu"
    limit, error = LIMITS[out.dtype] * (TRUNCATION_FACTOR if truncated else 1), relative_error(out, reference)
    assert error <= limit, f"relative error {error:.2e}, at most {limit:.0e} for {out.dtype}"
    out, reference = (x.double().flatten(0, -2) for x in (out, reference))
    norms = reference.norm(dim=1)
    worst = ((out - reference).norm(dim=1) / norms.maximum(norms.square().mean().sqrt())).max().item()
    assert worst <= ROW_FACTOR * limit, f"relative error {worst:.2e} in one row, at most {ROW_FACTOR * limit:.0e}"


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor of NaN: what a kernel does not write, or reads without leave, shows."""
    return torch.full(shape, float("nan"), dtype=dtype)
