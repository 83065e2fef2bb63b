"""x + gate · y against the fp32 reference; in place, strided, row-exact, gates of a step from a table."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.tolerance import assert_close, poisoned
from tetrion.kernels import reference
from tetrion.kernels.gated_residual import gated_residual


@pytest.mark.parametrize(("num_rows", "width"), [(1, 32), (7, 384), (5, 3072)])
def test_gated_residual(device, dtype, num_rows, width) -> None:
    x, y = (torch.randn(num_rows, width).to(dtype) for _ in range(2))
    gate, out = torch.randn(width).to(dtype), poisoned(num_rows, width, dtype=dtype)
    assert gated_residual(x, gate, y, out=out) is out
    assert_close(out, reference.gated_residual(x.float(), gate.float(), y.float()))
    gated_residual(x, gate, y, out=x)
    assert torch.equal(x, out)


def test_rows_are_exact_whatever_else_is_in_the_call(device, dtype) -> None:
    x, y, gate = torch.randn(20, 96).to(dtype), torch.randn(20, 96).to(dtype), torch.randn(96)
    whole = gated_residual(x, gate, y)
    for rows in (slice(0, 1), slice(3, 20), slice(4, 4)):
        assert torch.equal(gated_residual(x[rows], gate, y[rows]), whole[rows])


def test_a_step_counter_picks_the_row_and_strides_are_kept(device, dtype) -> None:
    x, y, table = torch.randn(6, 96).to(dtype), torch.randn(6, 3, 96).to(dtype)[:, 1], torch.randn(4, 2, 96)
    wide, step = poisoned(6, 200, dtype=dtype), torch.zeros(1, dtype=torch.int32)
    for index in (0, 3):
        step.fill_(index)
        gated_residual(x, table[:, 1], y, step=step, out=wide[:, 40:136])
        assert torch.equal(wide[:, 40:136], gated_residual(x, table[index, 1], y))
    wide[:, 40:136] = float("nan")
    assert wide.isnan().all()
