"""What is said of library modules without the libraries is what these make of the same configs."""

import json
from pathlib import Path

import pytest

from tetrion.engine.families.checkpoint import embedded_folder
from tetrion.engine.families.components import (
    Flux2VaeConfig,
    VaeConfig,
    read_clip,
    read_mistral3,
    read_part,
    read_qwen3,
    read_qwen25_vl,
    read_t5,
)
from tetrion.engine.families.library_shapes import (
    BESIDE_DECODER,
    CLIP_PREFIX,
    T5_EMBEDDINGS,
    clip_shapes,
    decoder_shapes,
    encoder_shapes,
    language_shapes,
    t5_shapes,
)
from tetrion.engine.models.autoencoders import Autoencoder
from tetrion.engine.models.encoders import ClipEncoder, ProjectedClipEncoder, T5Encoder
from tetrion.engine.models.flux2 import Flux2Codec
from tetrion.engine.models.language_encoders import MISTRAL3, QWEN3, QWEN25_VL, language_shapes_of

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


@pytest.mark.parametrize(("model", "num_layers"), [("z-image", 35), ("flux2-klein-9b", 27)])
def test_qwen3(model: str, num_layers: int) -> None:
    path = folder(model, "text_encoder")
    assert language_shapes(read_qwen3(path, num_layers, 512), num_layers) == language_shapes_of(QWEN3, num_layers)(path)


def test_qwen25_vl() -> None:
    path = folder("qwen-image", "text_encoder")
    theirs = language_shapes_of(QWEN25_VL, 28, is_normed=True)(path)
    assert language_shapes(read_qwen25_vl(path, 1058), 28, is_normed=True) == theirs


def test_mistral3() -> None:
    path = folder("flux2-dev", "text_encoder")
    assert language_shapes(read_mistral3(path, 30, 512), 30) == language_shapes_of(MISTRAL3, 30)(path)


@pytest.mark.parametrize("changes", [{}, {"decoder_block_out_channels": [96, 192, 384, 384]}])
def test_the_decoder_of_flux2(changes: dict[str, object], tmp_path: Path) -> None:
    config = json.loads((folder("flux2-klein-4b", "vae") / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    beside = (*BESIDE_DECODER, "bn.num_batches_tracked")
    theirs = {name: shape for name, shape in Flux2Codec.shapes(tmp_path).items() if not name.startswith(beside)}
    assert decoder_shapes(read_part(tmp_path, Flux2VaeConfig, "AutoencoderKLFlux2")) == theirs


@pytest.mark.parametrize("model", ["flux1-dev", "sd3-medium", "shapes"])
def test_both_halves_of_an_autoencoder(model: str) -> None:
    path = folder(model, "vae")
    theirs, config = Autoencoder.shapes(path), read_part(path, VaeConfig, "AutoencoderKL")
    is_encoders = {name: name.startswith(BESIDE_DECODER) for name in theirs}
    assert decoder_shapes(config) == {name: shape for name, shape in theirs.items() if not is_encoders[name]}
    assert encoder_shapes(config) == {name: shape for name, shape in theirs.items() if is_encoders[name]}
