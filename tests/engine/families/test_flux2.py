"""What the engine reads of FLUX.2's checkpoints, what FLUX.2 takes of a request, its weights at real sizes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from safetensors.torch import save_file

from tests.engine.families.folders import change, copied
from tetrion.engine.errors import RequestError
from tetrion.engine.families.checkpoint import embedded_folder
from tetrion.engine.families.flux2 import DEV, KLEIN, dynamic_shift, read_config, weights_plan
from tetrion.engine.families.plan import WeightsPlan
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.model_spec import CheckpointError
from tetrion.engine.models.dummy import DummyFiles
from tetrion.engine.models.flux2 import rope, transformer_shapes
from tetrion.engine.models.loading import Component, ComponentFiles, load_to_device, planned_shapes
from tetrion.engine.request import ImageRequest
from tetrion.engine.resolve import resolve_request

BILLIONS = {"flux2-klein-4b": 3.876, "flux2-klein-9b": 9.079, "flux2-dev": 32.223}
"""Parameters of the published transformers."""


@pytest.mark.parametrize(
    ("name", "heads", "num_steps", "guidance"),
    [
        ("flux2-klein-4b", 24, 4, 0.0),
        ("flux2-klein-9b", 32, 4, 0.0),
        ("flux2-klein-base-4b", 24, 50, 4.0),
        ("flux2-klein-base-9b", 32, 50, 4.0),
        ("flux2-dev", 48, 50, 4.0),
    ],
)
@pytest.mark.parametrize("with_preset", [True, False])
def test_published_models_have_their_defaults(
    name: str, heads: int, num_steps: int, guidance: float, with_preset: bool, tmp_path: Path
) -> None:
    """Without a preset file they follow from `is_distilled`."""
    folder = copied(name, tmp_path / name)
    if not with_preset:
        (folder / "preset.json").unlink()
    spec = read_model_spec(folder, "dummy")
    assert (spec.name, spec.family, spec.num_heads) == (name, "flux2", heads)
    assert (spec.num_steps, spec.guidance, spec.max_text_tokens) == (num_steps, guidance, 512)
    assert (spec.sizes.default, spec.sizes.max, spec.sizes.multiple) == ((1024, 1024), 2048, 16)
    assert {field.name: field.width for field in spec.fields} == {"text": 128 * heads, "latents": 128, "reference": 128}


@pytest.mark.parametrize("name", BILLIONS)
def test_real_transformers_have_their_size_and_every_tensor_is_used(name: str) -> None:
    folder = embedded_folder() / name / "transformer"
    shapes = transformer_shapes(folder)
    assert sum(map(math.prod, shapes.values())) / 1e9 == pytest.approx(BILLIONS[name], abs=0.001)
    plan = weights_plan(read_config(folder / "config.json"))
    assert {source for part in plan.values() for source in part.sources} == set(shapes)
    planned = planned_shapes({"transformer": Component(DummyFiles(folder, shapes), plan)})
    assert sum(map(math.prod, planned.values())) == sum(map(math.prod, shapes.values()))


def test_a_layer_for_two_is_loaded_as_two(tmp_path: Path) -> None:
    both = torch.randn(12, 3)
    save_file({"both.weight": both}, tmp_path / "model.safetensors")
    plan = WeightsPlan()
    plan.slices({"upper": 8, "lower": 4}, "both", 3)
    component = Component(ComponentFiles(tmp_path), plan)
    loaded = load_to_device({"it": component}, torch.device("cpu"), torch.float32)
    assert torch.equal(loaded["it/upper.weight"], both[:8]) and torch.equal(loaded["it/lower.weight"], both[8:])
    plan.slices({"upper": 8, "lower": 5}, "both", 3)
    with pytest.raises(CheckpointError, match=r"both.weight has shape \[12, 3\], config.json means \[13, 3\]"):
        planned_shapes({"it": component})


def test_a_base_model_is_guided_by_a_second_branch() -> None:
    spec = read_model_spec(embedded_folder() / "flux2-klein-base-4b", "dummy")
    for guidance, text in ((None, (512, 512)), (1.5, (512, 512)), (1.0, (512,)), (0.0, (512,))):
        assert resolve_request(ImageRequest(prompt="x", guidance=guidance), spec, 1).params.shape.text == text
    resolve_request(ImageRequest(prompt="x", negative_prompt="y"), spec, 1)
    with pytest.raises(RequestError, match="negative_prompt: takes a guidance above 1"):
        resolve_request(ImageRequest(prompt="x", negative_prompt="y", guidance=1.0), spec, 1)


def test_a_distilled_model_takes_no_guidance() -> None:
    spec = read_model_spec(embedded_folder() / "flux2-klein-4b", "dummy")
    for guidance in (None, 0.0, 4.0):
        assert resolve_request(ImageRequest(prompt="x", guidance=guidance), spec, 1).params.shape.num_branches == 1
    with pytest.raises(RequestError, match="negative_prompt: is no input of model 'flux2-klein-4b'"):
        resolve_request(ImageRequest(prompt="x", negative_prompt="y"), spec, 1)


def test_dev_takes_guidance_as_an_input() -> None:
    spec = read_model_spec(embedded_folder() / "flux2-dev", "dummy")
    for guidance in (None, 0.0, 4.0):
        assert resolve_request(ImageRequest(prompt="x", guidance=guidance), spec, 1).params.shape.text == (512,)
    with pytest.raises(RequestError, match="negative_prompt: is no input of model 'flux2-dev'"):
        resolve_request(ImageRequest(prompt="x", negative_prompt="y"), spec, 1)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_hidden_layers": 29}, "num_hidden_layers 29 must be at least 30"),
        ({"model_type": "llama"}, "text_config 'llama' is not supported"),
        ({"sliding_window": 256}, "sliding_window"),
        ({"head_dim": None}, "head_dim"),
    ],
)
def test_another_language_model_in_dev_is_refused(fields: dict[str, object], says: str, tmp_path: Path) -> None:
    folder = copied("flux2-dev", tmp_path / "copy")
    text = json.loads((folder / "text_encoder/config.json").read_bytes())["text_config"]
    change(folder, "text_encoder/config.json", text_config=text | fields)
    with pytest.raises(CheckpointError, match=says):
        read_model_spec(folder, "dummy")


@pytest.mark.parametrize("num_rows", [16, 256, 4096, 4300, 4301, 16384])
@pytest.mark.parametrize("num_steps", [1, 4, 10, 50, 200])
def test_the_shift_is_the_pipelines(num_rows: int, num_steps: int) -> None:
    assert dynamic_shift(num_rows, num_steps) == compute_empirical_mu(num_rows, num_steps)


def test_text_is_on_the_fourth_axis_and_the_picture_on_the_middle_ones() -> None:
    config = read_config(embedded_folder() / "flux2-klein-4b/transformer/config.json")
    cos, sin = rope(config, rows=3, columns=5, num_text=4)
    assert cos.shape == sin.shape == (19, 64)
    np.testing.assert_allclose(sin[:4, 48], np.sin(np.arange(4)), atol=1e-6)
    np.testing.assert_allclose(sin[4:, 16].view(3, 5), np.sin(np.arange(3))[:, None].repeat(5, 1), atol=1e-6)
    np.testing.assert_allclose(sin[4:, 32].view(3, 5), np.sin(np.arange(5))[None].repeat(3, 0), atol=1e-6)
    assert sin[:4, :48].eq(0).all() and sin[4:, :16].eq(0).all() and sin[4:, 48:].eq(0).all()


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("transformer/config.json", {"out_channels": 64}, "out_channels 64 must equal in_channels 128"),
        ("transformer/config.json", {"axes_dims_rope": [32, 32, 64]}, "axes_dims_rope"),
        ("transformer/config.json", {"axes_dims_rope": [32, 32, 32, 34]}, "add up to attention_head_dim 128"),
        ("transformer/config.json", {"eps": 1e-5}, "eps must be 1e-06"),
        ("transformer/config.json", {"patch_size": 2}, "patch_size"),
        ("transformer/config.json", {"joint_attention_dim": 2560}, "3 · hidden_size 7680.*joint_attention_dim 2560"),
        ("text_encoder/config.json", {"num_hidden_layers": 26}, "num_hidden_layers 26 must be at least 27"),
        ("vae/config.json", {"_class_name": "AutoencoderKL"}, "must be 'AutoencoderKLFlux2'"),
        ("vae/config.json", {"latent_channels": 16}, "latent_channels 16"),
        ("vae/config.json", {"patch_size": [4, 4]}, "patch_size"),
        ("vae/config.json", {"decoder_block_out_channels": [96, 128]}, "decoder_block_out_channels 2"),
        ("model_index.json", {"is_distilled": 3}, "is_distilled"),
        ("preset.json", {"max_size": 65536}, "max_size 65536 makes a shift"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(
    name: str, fields: dict[str, object], says: str, tmp_path: Path
) -> None:
    folder = copied("flux2-klein-4b", tmp_path / "copy")
    read_model_spec(folder, "dummy")
    change(folder, name, **fields)
    with pytest.raises(CheckpointError, match=says):
        read_model_spec(folder, "dummy")


def test_the_chat_is_qwens_without_thinking() -> None:
    after = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert KLEIN.form.of("a cat") == f"<|im_start|>user\na cat{after}"


def test_the_chat_of_dev_has_a_system_prompt_and_no_pictures() -> None:
    text = DEV.form.of("a [IMG]cat")
    assert text.startswith(f"<s>[SYSTEM_PROMPT]{SYSTEM_MESSAGE}[/SYSTEM_PROMPT][INST]")
    assert text.endswith("[INST]a cat[/INST]")
