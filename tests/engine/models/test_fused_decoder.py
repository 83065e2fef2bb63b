"""A decoder with fused norms decodes as it did without them."""

import copy

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from diffusers.models.autoencoders.vae import Decoder

from tests.kernels.conftest import DEVICES
from tetrion.engine.models.fused_decoder import FusedNorm, fuse


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("channels", "act_fn", "num_fused"),
    [((8, 16), "silu", 2 * 6 + 1), ((8, 12), "silu", 2 * 1 + 1), ((8, 16), "gelu", 1)],
)
def test_fused_decoder(device: str, channels: tuple[int, ...], act_fn: str, num_fused: int) -> None:
    """12 channels in 4 groups are not the kernel's, and its SiLU is no GELU: those norms stay."""
    torch.manual_seed(0)
    plain = Decoder(
        in_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=4,
        act_fn=act_fn,
    ).to(device)
    for name, parameter in plain.named_parameters():
        if "norm" in name:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    fused = copy.deepcopy(plain)
    fuse(fused)
    assert sum(isinstance(module, FusedNorm) for module in fused.modules()) == num_fused
    latents = torch.randn(1, 4, 6, 10, device=device)
    with torch.backends.cudnn.flags(allow_tf32=False):
        expected, picture = plain(latents), fused(latents)
    assert picture.shape == (1, 3, 12, 20)
    torch.testing.assert_close(picture, expected, rtol=1e-3, atol=1e-3)
