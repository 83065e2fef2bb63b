"""SD3's forward pass for training is diffusers' own, on latents in FLUX's order within a token."""

import pytest
import torch
from diffusers import SD3Transformer2DModel

from benchmarks.embedded_model.train_transformer import pack
from benchmarks.embedded_model.training_forward import Inputs
from benchmarks.embedded_model.training_forward_sd3 import SD3Forward

WIDTH, HEIGHT, CHANNELS = 128, 96, 4


@pytest.fixture(scope="module")
def transformer() -> SD3Transformer2DModel:
    torch.manual_seed(3)
    return SD3Transformer2DModel(
        sample_size=24,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=24,
        caption_projection_dim=48,
        pooled_projection_dim=20,
        pos_embed_max_size=12,
        qk_norm="rms_norm",
    ).eval()


@torch.no_grad()
def test_velocity_is_that_of_diffusers(transformer):
    latents, text, pooled = torch.randn(2, CHANNELS, HEIGHT // 8, WIDTH // 8), torch.randn(2, 9, 24), torch.randn(2, 20)
    sigma = torch.tensor([0.25, 0.9])
    expected = transformer(latents, text, pooled, sigma * 1000, return_dict=False)[0]
    out = SD3Forward(transformer, torch.float32)(Inputs(pack(latents), sigma, text, pooled, (WIDTH, HEIGHT)))
    torch.testing.assert_close(out, pack(expected), rtol=1e-4, atol=1e-5)
