"""SwiGLU's middle against the fp32 reference; strided, row-exact, at the ends of what fp32 holds."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.tolerance import assert_close
from tetrion.kernels import reference
from tetrion.kernels.silu_product import silu_product

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


@pytest.mark.parametrize(("rows", "width"), [(1, 2), (7, 200), (3, 3000), (0, 64)])
def test_silu_product(device, dtype, rows, width) -> None:
    x = torch.randn(rows, 3 + width).mul(3).to(dtype)[:, 3:]
    out = silu_product(x)
    assert out.shape == (rows, width // 2)
    if rows:
        assert_close(out, reference.silu_product(x.float()))
        assert torch.equal(silu_product(x[-1:]), out[-1:])


def test_large_values_are_no_problem(device) -> None:
    x = torch.tensor([[-1000.0, 1000.0, 0.0, 2.0, 3.0, 5.0]])
    assert silu_product(x).tolist() == [[0.0, 3000.0, 0.0]]
