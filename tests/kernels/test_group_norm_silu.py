"""Group norm with SiLU against the fp32 reference: any number of pixels, tiles shared by programs, large means."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.tolerance import assert_close
from tetrion.kernels import group_norm_silu as module
from tetrion.kernels import reference
from tetrion.kernels.group_norm_silu import group_norm_silu


@pytest.mark.parametrize(("pixels", "width", "groups"), [(5, 16, 4), (37, 16, 4), (500, 64, 32), (300, 512, 32)])
def test_group_norm_silu(device, dtype, pixels, width, groups) -> None:
    x = torch.randn(pixels, width).mul(3).add(torch.randn(width)).to(dtype)
    weight, bias = torch.randn(2, width).to(dtype)
    out = group_norm_silu(x, weight, bias, groups, 1e-6)
    assert out.dtype == dtype
    assert_close(out, reference.group_norm_silu(x.float(), weight.float(), bias.float(), groups, 1e-6))


def test_programs_join_what_they_have_seen(device, monkeypatch) -> None:
    """Three programs, seven tiles, the last of them short; a mean a thousand times the deviation."""
    monkeypatch.setattr(module, "TILE", 64)
    monkeypatch.setattr(module, "MAX_PROGRAMS", 3)
    x = torch.randn(6 * 8 + 3, 8) + 1000 * (1 + torch.arange(2).repeat_interleave(4))
    out = group_norm_silu(x, torch.ones(8), torch.zeros(8), 2, 1e-6)
    expected = reference.group_norm_silu(x.double(), torch.ones(8).double(), torch.zeros(8).double(), 2, 1e-6)
    torch.testing.assert_close(out, expected.float(), rtol=2e-3, atol=2e-3)


def test_what_it_cannot_do_is_refused(device) -> None:
    ones = torch.ones(12)
    with pytest.raises(AssertionError, match="12 in 4"):
        group_norm_silu(torch.ones(3, 12), ones, ones, 4, 1e-6)
    with pytest.raises(AssertionError, match="strides"):
        group_norm_silu(torch.ones(16, 8).T, ones, ones, 4, 1e-6)
