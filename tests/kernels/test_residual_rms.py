"""x + gate · RMSNorm(y), normed again and scaled, against the fp32 reference; strided, row-exact, from tables."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.tolerance import assert_close, poisoned
from tetrion.kernels import reference
from tetrion.kernels.residual_rms import gated_rms_sum, residual_rms

EPSILON = 1e-5


@pytest.mark.parametrize(("rows", "width"), [(1, 32), (7, 480), (3, 2304), (5, 3840)])
def test_residual_rms(device, dtype, rows, width) -> None:
    x, y = (torch.randn(rows, width).mul(2).add(1).to(dtype) for _ in range(2))
    scale, gate = torch.randn(2, width).to(dtype)
    given = y.clone()
    total, normed = residual_rms(x, scale, gate, given, epsilon=EPSILON)
    assert total is given
    assert_close(total, x.float() + gate.float() * reference.rms_norm(y.float(), EPSILON))
    assert_close(normed, reference.rms_norm(total.float(), EPSILON) * scale.float())
    assert torch.equal(gated_rms_sum(x, gate, y.clone(), epsilon=EPSILON), total)
    same, alone = residual_rms(x, scale, epsilon=EPSILON)
    assert same is x
    assert_close(alone, reference.rms_norm(x.float(), EPSILON) * scale.float())


def test_rows_are_exact_whatever_else_is_in_the_call(device, dtype) -> None:
    x, y = torch.randn(2, 20, 96).to(dtype)
    scale, gate = torch.randn(2, 96).to(dtype)
    total, normed = residual_rms(x, scale, gate, y.clone(), epsilon=EPSILON)
    for rows in (slice(0, 1), slice(3, 20), slice(5, 5)):
        part, part_normed = residual_rms(x[rows], scale, gate, y[rows].clone(), epsilon=EPSILON)
        assert torch.equal(part, total[rows]) and torch.equal(part_normed, normed[rows])


def test_a_step_counter_picks_the_row_and_strides_are_kept(device, dtype) -> None:
    x, wide = torch.randn(6, 3, 96).to(dtype)[:, 1], poisoned(6, 200, dtype=dtype)
    y, table, step = torch.randn(6, 96).to(dtype), torch.randn(4, 6, 96).to(dtype), torch.zeros(1, dtype=torch.int32)
    for index in (0, 3):
        step.fill_(index)
        wide[:, 40:136] = y
        total, normed = residual_rms(x, table[:, 1], table[:, 4], wide[:, 40:136], epsilon=EPSILON, step=step)
        scale, gate = table[index, 1], table[index, 4]
        same, same_normed = residual_rms(x, scale, gate, y.clone(), epsilon=EPSILON)
        assert torch.equal(total, same) and torch.equal(normed, same_normed)
    wide[:, 40:136] = float("nan")
    assert wide.isnan().all()
