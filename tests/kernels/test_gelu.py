"""GELU against the fp32 reference; extremes, in place, into a column slice, row-exact."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.tolerance import assert_close, poisoned
from tetrion.kernels import reference
from tetrion.kernels.gelu import gelu


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize(("num_rows", "width"), [(1, 32), (7, 384), (3, 1500)])
def test_gelu_into_a_column_slice(device, dtype, num_rows, width) -> None:
    x, wide = (torch.randn(num_rows, width) * 3).to(dtype), poisoned(num_rows, width + 64, dtype=dtype)
    out = wide[:, 64:]
    assert gelu(x, out=out) is out
    assert_close(out, reference.gelu_tanh(x.float()))
    assert wide[:, :64].isnan().all()
    assert torch.equal(gelu(x, out=x), out)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # x / inf is the right zero
def test_extremes(device) -> None:
    x = torch.tensor([[0.0, -0.0, 1e-30, -1e-30, 30.0, -30.0, 1e4, -1e4]])
    torch.testing.assert_close(gelu(x), reference.gelu_tanh(x), rtol=1e-5, atol=1e-6)


def test_rows_are_exact_whatever_else_is_in_the_call(device, dtype) -> None:
    x = torch.randn(20, 96).to(dtype)
    whole = gelu(x)
    for rows in (slice(0, 1), slice(3, 20), slice(4, 4)):
        assert torch.equal(gelu(x[rows]), whole[rows])
