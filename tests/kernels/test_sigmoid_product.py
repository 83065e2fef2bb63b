"""An output gate against the fp32 reference; strided, row-exact, at the ends of what fp32 holds."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.tolerance import assert_close
from tetrion.kernels import reference
from tetrion.kernels.sigmoid_product import sigmoid_product

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


@pytest.mark.parametrize(("rows", "width"), [(1, 2), (7, 200), (3, 1500), (0, 64)])
def test_sigmoid_product(device, dtype, rows, width) -> None:
    x, gate = (torch.randn(rows, 3 + width).mul(3).to(dtype)[:, 3:] for _ in range(2))
    out = sigmoid_product(x, gate)
    assert out.shape == (rows, width)
    if rows:
        assert_close(out, x.float() * gate.float().sigmoid())
        assert_close(out, reference.sigmoid_product(x.float(), gate.float()))
        assert torch.equal(sigmoid_product(x[-1:], gate[-1:]), out[-1:])


def test_large_values_are_no_problem(device) -> None:
    gate = torch.tensor([[-1000.0, 1000.0, 0.0]])
    assert sigmoid_product(torch.full((1, 3), 2.0), gate).tolist() == [[0.0, 2.0, 1.0]]
