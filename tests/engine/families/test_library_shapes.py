"""What is said of library modules without the libraries is what these make of the same configs."""

from pathlib import Path

import pytest

from tetrion.engine.families.checkpoint import embedded_folder
from tetrion.engine.families.components import VaeConfig, read_clip, read_part, read_t5
from tetrion.engine.families.library_shapes import (
    BESIDE_DECODER,
    CLIP_PREFIX,
    T5_EMBEDDINGS,
    clip_shapes,
    decoder_shapes,
    encoder_shapes,
    t5_shapes,
)
from tetrion.engine.models.autoencoders import Autoencoder
from tetrion.engine.models.encoders import ClipEncoder, ProjectedClipEncoder, T5Encoder

CLIPS = [("flux1-dev", "text_encoder"), ("shapes", "text_encoder"), ("sd3-medium", "text_encoder"),
         ("sd3-medium", "text_encoder_2"), ("shapes-sd3", "text_encoder_2")]  # fmt: skip


def folder(model: str, part: str) -> Path:
    return embedded_folder() / model / part


@pytest.mark.parametrize(("model", "part"), CLIPS)
def test_clip(model: str, part: str) -> None:
    is_projected = "sd3" in model
    theirs = (ProjectedClipEncoder if is_projected else ClipEncoder).shapes(folder(model, part))
    ours = clip_shapes(read_clip(folder(model, part), is_projected), is_projected)
    assert ours == {name.removeprefix(CLIP_PREFIX): shape for name, shape in theirs.items()}


@pytest.mark.parametrize("model", ["flux1-dev", "shapes"])
def test_t5(model: str) -> None:
    path = folder(model, "text_encoder_2")
    assert t5_shapes(read_t5(path), T5_EMBEDDINGS[0]) == T5Encoder.shapes(path)


@pytest.mark.parametrize("model", ["flux1-dev", "sd3-medium", "shapes"])
def test_both_halves_of_an_autoencoder(model: str) -> None:
    path = folder(model, "vae")
    theirs, config = Autoencoder.shapes(path), read_part(path, VaeConfig, "AutoencoderKL")
    is_encoders = {name: name.startswith(BESIDE_DECODER) for name in theirs}
    assert decoder_shapes(config) == {name: shape for name, shape in theirs.items() if not is_encoders[name]}
    assert encoder_shapes(config) == {name: shape for name, shape in theirs.items() if is_encoders[name]}
