"""AutoencoderKLQwenImage over one frame, as the library has it over a video of one."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage

from tests.engine.specs import make_spec
from tetrion.engine.families.components import read_part
from tetrion.engine.families.qwen_image_vae import (
    VAE_CLASS,
    QwenImageVaeConfig,
    check_autoencoder,
    decoder_shapes,
    encoder_shapes,
    frame_shapes,
    has_encoder,
)
from tetrion.engine.families.weights import read_shapes
from tetrion.engine.model_spec import CheckpointError, Sizes
from tetrion.engine.models.loading import ComponentFiles, load_to_device
from tetrion.engine.models.qwen_image_vae import QwenImageCodec, fuse
from tetrion.engine.sampling.flow_match import pack_latents

TINY = {
    "base_dim": 10, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [True, True],
    "latents_mean": [0.3, -0.2, 0.5, 0.1], "latents_std": [1.5, 0.7, 2.0, 1.1],
}  # fmt: skip
SIZES = Sizes(min=16, max=512, multiple=8, default=(64, 64))
SPEC = make_spec(inputs=frozenset({"pictures"}), sizes=SIZES)
SHAPE = SPEC.shape(112, 144)


@pytest.fixture(scope="module")
def theirs() -> AutoencoderKLQwenImage:
    torch.manual_seed(5)
    vae = AutoencoderKLQwenImage(**TINY).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if parameter.ndim != 5:
            parameter.copy_(torch.randn_like(parameter) * 0.2 + ("gamma" in name))
    return vae


@pytest.fixture(scope="module")
def folder(theirs: AutoencoderKLQwenImage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "vae"
    theirs.save_pretrained(path)
    return path


def load(folder: Path, spec=SPEC) -> QwenImageCodec:
    component = QwenImageCodec.component(ComponentFiles(folder), spec)
    tensors = load_to_device({"vae": component}, torch.device("cpu"), torch.float32)
    return QwenImageCodec(folder, {name.removeprefix("vae/"): tensor for name, tensor in tensors.items()}, spec)


@pytest.fixture
def codec(folder: Path) -> QwenImageCodec:
    return load(folder)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def picture() -> torch.Tensor:
    x, y, channel = np.arange(112)[None, :, None], np.arange(144)[:, None, None], np.arange(3)
    return torch.from_numpy((np.sin(x / 5.0 + channel) * 60 + np.cos(y / (4.0 + channel)) * 60 + 128).astype(np.uint8))


def expected_picture(theirs: AutoencoderKLQwenImage, latents_CHW: torch.Tensor, tiled: bool = False) -> torch.Tensor:
    mean, deviation = (torch.tensor(TINY[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    decode = theirs.tiled_decode if tiled else theirs.decode
    decoded = decode(latents_CHW[None, :, None] * deviation + mean, return_dict=False)[0][0, :, 0]
    return ((decoded * 0.5 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0)


@pytest.mark.parametrize("tiled", [False, True])
def test_latents_become_the_librarys_picture(theirs, codec: QwenImageCodec, tiled: bool) -> None:
    for vae in (theirs, codec._vae):
        vae.tile_sample_min_height = vae.tile_sample_min_width = 64
        vae.tile_sample_stride_height = vae.tile_sample_stride_width = 48
    latents = torch.randn(4, 36, 28)
    codec.whole_pixels = 112 * 144 - tiled
    pixels = codec.decode(pack_latents(latents), SHAPE).pixels
    assert (pixels.float() - expected_picture(theirs, latents, tiled)).abs().max() <= 1


@pytest.mark.parametrize("tiled", [False, True])
def test_a_picture_becomes_the_librarys_latents(theirs, codec: QwenImageCodec, tiled: bool) -> None:
    for vae in (theirs, codec._vae):
        vae.tile_sample_min_height = vae.tile_sample_min_width = 64
        vae.tile_sample_stride_height = vae.tile_sample_stride_width = 48
    codec.whole_pixels = 112 * 144 - tiled
    x = picture().permute(2, 0, 1)[None, :, None].float() / 255 * 2 - 1
    mean, deviation = (torch.tensor(TINY[name]).view(-1, 1, 1) for name in ("latents_mean", "latents_std"))
    encoded = theirs.tiled_encode(x) if tiled else theirs.encode(x).latent_dist.parameters
    expected = pack_latents((encoded[0, :4, 0] - mean) / deviation)
    torch.testing.assert_close(codec.reference(picture()), expected, rtol=1e-5, atol=1e-5)


def test_bits_do_not_depend_on_the_number_of_threads(codec: QwenImageCodec) -> None:
    latents, results = torch.randn(18 * 14, 16), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        decoded = codec._vae.decode(codec._batched(codec._decodable(latents, 18, 14)), return_dict=False)[0]
        results.append((decoded, codec.reference(picture())))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_what_is_made_for_gpus_decodes_the_same(theirs: AutoencoderKLQwenImage) -> None:
    fused = copy.deepcopy(theirs.decoder)
    fuse(fused)
    assert not any("RMS_norm" in type(module).__name__ for module in fused.modules())
    latents = torch.randn(1, 4, 1, 18, 14)
    torch.testing.assert_close(fused(latents), theirs.decoder(latents), rtol=1e-4, atol=1e-4)


def test_a_third_of_the_convolutions_is_loaded_and_no_encoder_without_pictures(folder: Path) -> None:
    shapes = read_shapes(folder)
    component = QwenImageCodec.component(ComponentFiles(folder), make_spec())
    assert set(component.plan) == set(frame_shapes(decoder_shapes(read_part(folder, QwenImageVaeConfig, VAE_CLASS))))
    assert component.plan["decoder.conv_in.weight"].in_memory(shapes["decoder.conv_in.weight"]) == (20, 4, 3, 3)
    load(folder, make_spec())


@pytest.mark.parametrize("changes", [{}, {"dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True]}])
def test_names_and_shapes_are_the_librarys(folder: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    config = json.loads((folder / "config.json").read_bytes()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = read_part(tmp_path, QwenImageVaeConfig, VAE_CLASS)
    assert decoder_shapes(ours) | encoder_shapes(ours) == QwenImageCodec.shapes(tmp_path)


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    config, shapes = read_part(folder, QwenImageVaeConfig, VAE_CLASS), read_shapes(folder)
    check_autoencoder(folder, config, shapes)
    decoder = {name: shape for name, shape in shapes.items() if not has_encoder({name: shape})}
    check_autoencoder(folder, config, decoder)
    with pytest.raises(CheckpointError, match="has shape"):
        check_autoencoder(folder, config, shapes | {"decoder.conv_in.weight": (20, 4, 3, 3)})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"latents_std": [1.0, 0.0, 1.0, 1.0]}, "latents_std"),
        ({"latents_mean": [1.0]}, "latents_mean 1 and latents_std 4 must be as many as z_dim 4"),
        ({"temperal_downsample": [True]}, "temperal_downsample 1 must be one less than dim_mult 3"),
        ({"attn_scales": [0.5]}, "attn_scales"),
        ({"base_dim": 5, "dim_mult": [1, 3, 2]}, "must be even"),
        ({"input_channels": 4}, "input_channels"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(folder: Path, tmp_path: Path, changes, says: str) -> None:
    config = json.loads((folder / "config.json").read_bytes()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=says):
        read_part(tmp_path, QwenImageVaeConfig, VAE_CLASS)
