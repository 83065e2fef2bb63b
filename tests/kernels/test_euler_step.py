"""The Euler step against fp32 arithmetic, at the counter's step; row-exact."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.tolerance import assert_close
from tetrion.kernels.euler_step import euler_step


def test_equals_the_arithmetic_at_the_counters_step(device, dtype) -> None:
    latents, velocity = torch.randn(37, 64), torch.randn(37, 64).to(dtype)
    deltas = torch.randn(4)
    for step in range(4):
        result = euler_step(latents, velocity, deltas, torch.tensor([step], dtype=torch.int32))
        assert result.dtype == torch.float32
        assert_close(result, latents.double() + deltas[step].double() * velocity.double())


def test_rows_are_exact_whatever_else_is_in_the_call(device, dtype) -> None:
    latents, velocity = torch.randn(37, 16), torch.randn(37, 16).to(dtype)
    deltas, step = torch.randn(2), torch.ones(1, dtype=torch.int32)
    whole = euler_step(latents, velocity, deltas, step)
    for rows in (slice(0, 1), slice(5, 37), slice(4, 4)):
        assert torch.equal(euler_step(latents[rows], velocity[rows], deltas, step), whole[rows])
