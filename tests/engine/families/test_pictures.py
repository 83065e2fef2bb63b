"""Which models take pictures, and as what: Kontext, Fill, and whatever has an encoder to begin with one."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.engine.families.folders import change, copied, refusal, rewrite, taken
from tetrion.engine.families.locate import resolve_model
from tetrion.engine.families.pictures import KONTEXT_SIZES
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.model_spec import ModelSpec


def published(name: str) -> ModelSpec:
    return read_model_spec(resolve_model(name), "dummy")


def test_kontext_knows_the_sizes_that_it_was_trained_on() -> None:
    spec = published("flux1-kontext-dev")
    assert spec.reference_sizes == KONTEXT_SIZES and spec.max_pictures == 1 and "strength" not in spec.inputs
    assert spec.reference_size((4000, 3000)) == (1184, 880) and spec.reference_size((1, 1)) == (1024, 1024)
    assert spec.segments == ("text", "image", "reference") and spec.max_rows("reference") == 4150
    assert spec.largest_shape.reference == 4150


@pytest.mark.parametrize("name", ["flux2-dev", "flux2-klein-4b", "flux2-klein-base-9b"])
def test_flux2_has_references_in_their_own_shapes(name: str) -> None:
    spec = published(name)
    assert "pictures" in spec.inputs and "strength" not in spec.inputs and spec.max_pictures == 4
    assert spec.reference_size((4000, 3000)) == (1168, 880) and spec.reference_size((100, 70)) == (96, 64)
    assert spec.max_rows("reference") == spec.largest_shape.reference == 4 * 4096
    assert spec.max_input_bytes == 4 * 3 * 1024**2


def test_fill_takes_a_mask_and_no_negative_prompt() -> None:
    spec = published("flux1-fill-dev")
    assert spec.inputs == {"pictures", "mask", "strength"} and (spec.strength, spec.max_branches) == (1.0, 1)
    assert (spec.num_steps, spec.guidance) == (50, 30.0)
    assert {field.name: field.width for field in spec.fields}["around"] == 320 and spec.latents.width == 64


@pytest.mark.parametrize("name", ["flux1-dev", "sd3-medium", "z-image-turbo", "shapes", "shapes-sd3"])
def test_others_begin_with_a_picture(name: str) -> None:
    spec = published(name)
    assert {"pictures", "strength"} <= spec.inputs and spec.strength == 0.6 and not spec.reference_sizes


def test_a_vae_without_an_encoder_takes_no_pictures_and_makes_no_kontext(tmp_path: Path) -> None:
    folder = copied("shapes", tmp_path / "model")
    before = dict(taken(folder).weights)
    strip_encoder(folder)
    spec = taken(folder)
    assert not spec.inputs & {"pictures", "strength"} and spec.max_pictures == spec.max_input_bytes == 0
    assert dict(spec.weights)["vae"] < before["vae"]
    change(folder, "model_index.json", _class_name="FluxKontextPipeline")
    assert "vae' has no encoder, which pictures need that are to be edited" in refusal(folder)


def test_half_an_encoder_is_refused(tmp_path: Path) -> None:
    folder = copied("shapes", tmp_path / "model")
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    rewrite(path, lambda header: header.update({"encoder.other": header.pop("encoder.conv_out.bias")}))
    assert "has no tensor encoder.conv_out.bias, which config.json means" in refusal(folder)


def test_a_small_kontext_has_small_references(tmp_path: Path) -> None:
    folder = copied("shapes", tmp_path / "model")
    change(folder, "model_index.json", _class_name="FluxKontextPipeline")
    spec = taken(folder)
    assert (256, 256) in spec.reference_sizes and len(spec.reference_sizes) == len(set(spec.reference_sizes))
    assert all(side % spec.sizes.multiple == 0 for size in spec.reference_sizes for side in size)


def test_a_fill_that_reads_other_channels_is_refused(tmp_path: Path) -> None:
    folder = copied("shapes", tmp_path / "model")
    change(folder, "model_index.json", _class_name="FluxFillPipeline")
    assert "in_channels 32 must be 320 with out_channels 32" in refusal(folder)
    change(folder, "model_index.json", _class_name="FluxPipeline")
    change(folder, "transformer/config.json", out_channels=16)
    assert refusal(folder)


def strip_encoder(folder: Path) -> None:
    """Of the autoencoder."""
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({name: t for name, t in tensors.items() if not name.startswith(("encoder.", "quant_conv."))}, path)


def test_an_encoder_of_other_blocks_is_left_out(tmp_path: Path) -> None:
    folder = copied("shapes", tmp_path / "model")
    change(folder, "vae/config.json", down_block_types=["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"])
    assert "pictures" not in taken(folder).inputs
    strip_encoder(folder)
    assert "pictures" not in taken(folder).inputs
