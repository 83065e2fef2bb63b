"""FLUX's forward pass for training is diffusers' own, with and without guidance."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from benchmarks.embedded_model.training_forward import Inputs
from benchmarks.embedded_model.training_forward_flux import FluxForward, image_position_ids

NUM_TEXT, SIZE = 8, (128, 96)


@pytest.fixture(scope="module")
def transformer():
    folder = Path(__file__).parents[2] / "configs/models/shapes/transformer"
    return FluxTransformer2DModel.from_pretrained(folder).float().eval()


@pytest.fixture(scope="module")
def inputs(transformer):
    torch.manual_seed(4)
    config = transformer.config
    return Inputs(
        noisy=torch.randn(2, SIZE[0] * SIZE[1] // 256, config.in_channels),
        sigma=torch.tensor([0.25, 0.9]),
        text=torch.randn(2, NUM_TEXT, config.joint_attention_dim),
        pooled=torch.randn(2, config.pooled_projection_dim),
        size=SIZE,
    )


def diffusers_velocity(transformer, inputs) -> torch.Tensor:
    """With a reference as FluxKontextPipeline has it."""
    num_image, grid = inputs.noisy.shape[1], image_position_ids(*SIZE, "cpu")
    rows, ids = inputs.noisy, grid
    if inputs.reference is not None:
        rows, ids = torch.cat([rows, inputs.reference], 1), torch.cat([grid, grid + torch.tensor([1, 0, 0])])
    return transformer(
        rows,
        encoder_hidden_states=inputs.text,
        pooled_projections=inputs.pooled,
        timestep=inputs.sigma,
        img_ids=ids,
        txt_ids=torch.zeros(NUM_TEXT, 3),
        return_dict=False,
    )[0][:, :num_image]


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return ((out - expected).norm() / expected.norm()).item()


@torch.no_grad()
def test_velocity_is_that_of_diffusers(transformer, inputs):
    out = FluxForward(transformer, torch.float32)(inputs)
    torch.testing.assert_close(out, diffusers_velocity(transformer, inputs), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_reference_is_attended_to_as_diffusers_has_it(transformer, inputs):
    torch.manual_seed(5)
    edited = inputs._replace(reference=torch.randn_like(inputs.noisy))
    forward = FluxForward(transformer, torch.float32)
    out, without = forward(edited), forward(inputs)
    torch.testing.assert_close(out, diffusers_velocity(transformer, edited), rtol=1e-4, atol=1e-5)
    assert relative_error(without, out) > 1e-2


@torch.no_grad()
def test_guidance_leads_away_from_the_model_without_its_first_single_block(transformer, inputs):
    worse = copy.deepcopy(transformer)
    del worse.single_transformer_blocks[0]
    full, away = (diffusers_velocity(model, inputs) for model in (transformer, worse))
    assert relative_error(away, full) > 1e-3
    out = FluxForward(transformer, torch.float32).guided(inputs, scale=1.7)
    assert relative_error(out, away + 1.7 * (full - away)) < 1e-5
