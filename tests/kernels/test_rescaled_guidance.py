"""Guidance that keeps the prompt's norm against fp64 arithmetic and the reference, at the counter's step; row-exact."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.tolerance import assert_close
from tetrion.kernels import reference
from tetrion.kernels.rescaled_guidance import rescaled_guidance

GUIDANCE = torch.tensor([1.0, 4.0, 0.0])


def counter(step: int) -> Tensor:
    return torch.tensor([step], dtype=torch.int32)


@pytest.mark.parametrize("width", [64, 48, 16])
@pytest.mark.parametrize("num_rows", [37, 1])
def test_equals_the_formula_at_the_counters_step(device, dtype, num_rows: int, width: int) -> None:
    velocity, negative = torch.randn(2, num_rows, width).to(dtype)
    for step, guidance in enumerate(GUIDANCE.tolist()):
        result = rescaled_guidance(velocity, negative, GUIDANCE, counter(step))
        own, other = velocity.double(), negative.double()
        mixed = other + guidance * (own - other)
        expected = mixed * own.norm(dim=1, keepdim=True) / mixed.norm(dim=1, keepdim=True)
        assert result.dtype == torch.float32 and result.shape == velocity.shape
        assert_close(result, expected)
        assert_close(reference.rescaled_guidance(velocity, negative, guidance), expected)


def test_rows_are_exact_whatever_else_is_in_the_call(device, dtype) -> None:
    velocity, negative = torch.randn(2, 90, 48).to(dtype)
    for form in (
        lambda v, n: rescaled_guidance(v, n, GUIDANCE, counter(1)),
        lambda v, n: reference.rescaled_guidance(v, n, 4.0),
    ):
        whole = form(velocity, negative)
        for rows in (slice(0, 1), slice(5, 90), slice(4, 4)):
            assert torch.equal(form(velocity[rows], negative[rows]), whole[rows])


def test_rows_of_zeros_stay_so(device, dtype) -> None:
    zeros = torch.zeros(3, 16).to(dtype)
    assert not rescaled_guidance(zeros, zeros, GUIDANCE, counter(1)).any()
    assert not reference.rescaled_guidance(zeros, zeros, 4.0).any()
