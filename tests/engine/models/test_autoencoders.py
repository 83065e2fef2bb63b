"""Noise and decoding of the codec whose tokens are 2 × 2 latent pixels."""

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

from tetrion.engine.families.locate import resolve_model
from tetrion.engine.shape import StepShape


@pytest.mark.parametrize(("width", "height"), [(256, 256), (128, 512), (144, 208)])
def test_noise_equals_diffusers(load, width, height) -> None:
    loaded = load(resolve_model("shapes"))
    spec, shape, seed = loaded.spec, loaded.spec.shape(width, height), 2**63 + 5
    noise = loaded.codec.noise(seed, shape)
    channels, rows, columns = spec.latents.width // 4, height // 8, width // 8
    drawn = torch.randn(1, channels, rows, columns, generator=torch.Generator("cpu").manual_seed(seed))
    expected = FluxPipeline._pack_latents(drawn, 1, channels, rows, columns)[0]
    assert noise.dtype == torch.float32 and noise.shape == (shape.image, spec.latents.width)
    assert torch.equal(noise, expected)
    assert not torch.equal(noise, loaded.codec.noise(6, shape))


def test_noise_does_not_depend_on_the_text(load) -> None:
    codec = load(resolve_model("shapes")).codec
    one, other = (StepShape(width=128, height=128, image=64, text=text) for text in ((64,), (64, 3)))
    assert torch.equal(codec.noise(1, one), codec.noise(1, other))


def test_an_image_beyond_the_limit_is_decoded_in_tiles_that_show_little(load) -> None:
    loaded = load(resolve_model("shapes"))
    shape = loaded.spec.shape(320, 256)
    latents = loaded.codec.noise(1, shape)
    whole = loaded.codec.decode(latents, shape).pixels
    assert whole.shape == (256, 320, 3) and whole.dtype == torch.uint8
    loaded.codec.whole_pixels = 320 * 256 - 1
    tiled = loaded.codec.decode(latents, shape).pixels
    assert tiled.shape == whole.shape
    assert np.abs(tiled.numpy().astype(int) - whole.numpy()).mean() < 8
    loaded.codec.whole_pixels = 320 * 256
    assert torch.equal(loaded.codec.decode(latents, shape).pixels, whole)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_in_latents_or_in_the_decoder_is_told(load, value: float) -> None:
    loaded = load(resolve_model("shapes"))
    shape = loaded.spec.shape(128, 128)
    latents = loaded.codec.noise(1, shape)
    assert loaded.codec.decode(latents, shape).is_finite
    latents[3, 5] = value
    assert not loaded.codec.decode(latents, shape).is_finite
    assert not loaded.codec.decode(torch.full_like(latents, 3e38), shape).is_finite


def test_a_picture_beyond_the_limit_is_encoded_in_tiles_that_show_little(load) -> None:
    codec = load(resolve_model("shapes")).codec
    rows, columns = np.mgrid[0:256, 0:320]
    picture = torch.from_numpy(np.stack([rows % 256, columns % 256, (rows + columns) % 256], axis=2).astype(np.uint8))
    whole = codec.reference(picture)
    assert whole.shape == (256 * 320 // 256, 32)
    latents = codec.noise(1, StepShape(width=320, height=256, image=320, text=()))
    decoded = codec.decode(latents, StepShape(width=320, height=256, image=320, text=())).pixels
    codec.whole_pixels = 320 * 256 - 1
    tiled = codec.reference(picture)
    assert not torch.equal(tiled, whole) and (tiled - whole).abs().mean() < 0.3 * whole.std()
    codec.whole_pixels = 320 * 256
    assert torch.equal(codec.reference(picture), whole)
    again = codec.decode(latents, StepShape(width=320, height=256, image=320, text=())).pixels
    assert torch.equal(again, decoded), "decoding is left as it was"


def test_a_picture_comes_back_from_its_latents(load) -> None:
    """The embedded autoencoder, both halves."""
    codec = load(resolve_model("shapes")).codec
    picture = np.full((128, 128, 3), 255, np.uint8)
    picture[32:96, 32:96] = (220, 30, 30)
    shape = StepShape(width=128, height=128, image=64, text=())
    back = codec.decode(codec.reference(torch.from_numpy(picture)), shape).pixels.numpy()
    assert np.abs(back.astype(int) - picture).mean() < 12
