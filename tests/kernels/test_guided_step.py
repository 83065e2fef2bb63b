"""The tail of a step against fp64 arithmetic and the reference, at the counter's step; Euler's bits; row-exact."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.tolerance import assert_close
from tetrion.kernels import reference
from tetrion.kernels.guided_step import guided_step

STEPS = 3


def counter(step: int) -> Tensor:
    return torch.tensor([step], dtype=torch.int32)


def formula(state: Tensor, velocities: list[Tensor], coefficients: Tensor, guidance: float) -> Tensor:
    velocity, *negative = (v.double() for v in velocities)
    if negative:
        velocity = negative[0] + guidance * (velocity - negative[0])
    rows = torch.cat([state.double(), velocity], dim=1).unflatten(1, (-1, velocity.shape[1]))
    return torch.einsum("kj,njc->nkc", coefficients.double(), rows).flatten(1)


@pytest.mark.parametrize("num_velocities", [1, 2])
@pytest.mark.parametrize("num_rows", [1, 2, 4])
def test_equals_the_formula_at_the_counters_step(device, dtype, num_rows, num_velocities) -> None:
    state, guidance = torch.randn(37, num_rows * 48), torch.rand(STEPS) * 7
    velocities = [torch.randn(37, 48).to(dtype) for _ in range(num_velocities)]
    coefficients = torch.randn(STEPS, num_rows, num_rows + 1)
    for step in range(STEPS):
        result = guided_step(state, velocities, coefficients, guidance, counter(step))
        assert result.dtype == torch.float32
        assert_close(result, formula(state, velocities, coefficients[step], guidance[step].item()))
        assert_close(reference.guided_step(state, velocities, coefficients[step], guidance[step].item()), result)
        own = state.clone()
        assert guided_step(own, velocities, coefficients, guidance, counter(step), out=own) is own
        assert torch.equal(own, result)


def test_eulers_method_has_the_bits_of_one_multiply_add(device, dtype) -> None:
    """On a GPU one rounding, in the interpreter two, as everywhere in it."""
    state, velocity = torch.randn(50, 64), torch.randn(50, 64).to(dtype)
    delta = -torch.rand(STEPS) / 28
    coefficients = torch.stack([torch.ones(STEPS), delta], dim=1).unsqueeze(1)
    result = guided_step(state, [velocity], coefficients, torch.zeros(STEPS), counter(1))
    if device.type == "cuda":
        expected = (state.double() + delta[1].double() * velocity.double()).float()
    else:
        expected = state + delta[1] * velocity.float()
    assert torch.equal(result, expected)


def test_rows_are_exact_whatever_else_is_in_the_call(device, dtype) -> None:
    state, velocities = torch.randn(37, 32), [torch.randn(37, 16).to(dtype) for _ in range(2)]
    tables = torch.randn(2, 2, 3), torch.randn(2), counter(1)
    whole = guided_step(state, velocities, *tables)
    for rows in (slice(0, 1), slice(5, 37), slice(4, 4)):
        part = guided_step(state[rows], [v[rows] for v in velocities], *tables)
        assert torch.equal(part, whole[rows])
