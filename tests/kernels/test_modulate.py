"""LayerNorm with scale and shift against the fp32 reference; row-exact; tables indexed on the device."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.tolerance import assert_close, poisoned
from tetrion.kernels import reference
from tetrion.kernels.modulate import modulate


@pytest.mark.parametrize(("num_rows", "width"), [(1, 32), (7, 384), (5, 3072)])
def test_modulate(device, dtype, num_rows, width) -> None:
    x = (torch.randn(num_rows, width) * 3 + 1).to(dtype)
    shift, scale = (torch.randn(width).to(dtype) for _ in range(2))
    out = poisoned(num_rows, width, dtype=dtype)
    assert modulate(x, shift, scale, out=out) is out
    assert_close(out, reference.modulate(x.float(), shift.float(), scale.float()))


def test_rows_are_exact_whatever_else_is_in_the_call(device, dtype) -> None:
    x, shift, scale = torch.randn(20, 96).to(dtype), torch.randn(96), torch.randn(96)
    whole = modulate(x, shift, scale)
    for rows in (slice(0, 1), slice(3, 20), slice(19, 20), slice(4, 4)):
        assert torch.equal(modulate(x[rows], shift, scale), whole[rows])


def test_a_step_counter_picks_the_row_and_strides_are_kept(device, dtype) -> None:
    x = poisoned(6, 160, dtype=dtype)
    x[:, :96] = torch.randn(6, 96).to(dtype)
    table = torch.randn(4, 6, 96).to(dtype)
    wide, step = poisoned(6, 200, dtype=dtype), torch.zeros(1, dtype=torch.int32)
    for index in (0, 3):
        step.fill_(index)
        modulate(x[:, :96], table[:, 1], table[:, 4], step=step, out=wide[:, 40:136])
        assert torch.equal(wide[:, 40:136], modulate(x[:, :96], table[index, 1], table[index, 4]))
    wide[:, 40:136] = float("nan")
    assert wide.isnan().all()


def test_a_table_without_a_step_is_refused(device) -> None:
    x, table = torch.randn(2, 32), torch.randn(4, 32)
    with pytest.raises(AssertionError, match="no step"):
        modulate(x, table, table)
