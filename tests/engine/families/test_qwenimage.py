"""Qwen-Image as the engine knows it: real sizes, rows of texts, branches, positions, what is refused."""

import math
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

from tests.engine.families.folders import change, copied
from tetrion.engine.errors import RequestError
from tetrion.engine.families.checkpoint import embedded_folder
from tetrion.engine.families.qwenimage import CHAT, read_config, weights_plan
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.model_spec import CheckpointError, ModelSpec
from tetrion.engine.models.dummy import DummyFiles
from tetrion.engine.models.loading import Component, planned_shapes
from tetrion.engine.models.qwenimage import rope, transformer_shapes
from tetrion.engine.request import ImageRequest
from tetrion.engine.resolve import resolve_request

TRANSFORMER = embedded_folder() / "qwen-image" / "transformer"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copied("qwen-image", tmp_path / "copy")


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return read_model_spec(embedded_folder() / "qwen-image", "dummy")


@pytest.mark.parametrize("with_preset", [True, False])
def test_the_published_model_has_its_defaults(folder: Path, with_preset: bool) -> None:
    if not with_preset:
        (folder / "preset.json").unlink()
    spec = read_model_spec(folder, "dummy")
    assert (spec.family, spec.num_steps, spec.guidance, spec.max_text_tokens) == ("qwenimage", 50, 4.0, 1024)
    assert (spec.num_heads, spec.head_dim, spec.sizes.default) == (24, 128, (1024, 1024))
    assert (spec.sizes.max, spec.sizes.multiple, spec.strength, spec.max_pictures) == (2048, 16, 0.6, 1)


def test_the_real_transformer_has_its_size_and_every_tensor_is_used() -> None:
    shapes = transformer_shapes(TRANSFORMER)
    assert sum(map(math.prod, shapes.values())) / 1e9 == pytest.approx(20.43, abs=0.005)
    plan = weights_plan(read_config(TRANSFORMER / "config.json"))
    assert {source for part in plan.values() for source in part.sources} == set(shapes)
    planned = planned_shapes({"transformer": Component(DummyFiles(TRANSFORMER, shapes), plan)})
    assert sum(map(math.prod, planned.values())) == sum(map(math.prod, shapes.values()))


@pytest.mark.parametrize(("words", "rows"), [(1, 2), (31, 32), (1023, 1024), (1024, 1024), (4000, 1024)])
def test_a_text_has_as_many_rows_as_its_prompt(spec: ModelSpec, words: int, rows: int) -> None:
    """Without a tokenizer a prompt has a token for each word and one for its end."""
    request = ImageRequest(prompt="x " * words, negative_prompt="a b c", width=512, height=256)
    assert resolve_request(request, spec, 1).params.shape.text == (rows, 4)


@pytest.mark.parametrize(
    ("guidance", "negative", "num_branches"), [(None, None, 1), (None, " ", 2), (1.5, "", 2), (1.0, None, 1)]
)
def test_a_negative_prompt_takes_two_branches(
    spec: ModelSpec, guidance: float | None, negative: str | None, num_branches: int
) -> None:
    request = ImageRequest(prompt="x", guidance=guidance, negative_prompt=negative)
    assert resolve_request(request, spec, 1).params.shape.num_branches == num_branches


def test_a_negative_prompt_is_taken_with_guidance_only(spec: ModelSpec) -> None:
    with pytest.raises(RequestError, match="negative_prompt: takes a guidance above 1"):
        resolve_request(ImageRequest(prompt="x", negative_prompt="y", guidance=1.0), spec, 1)


@pytest.mark.parametrize(
    ("size", "references"), [((4, 6), ()), ((5, 3), ()), ((7, 4), ((9, 2),)), ((2, 2), ((3, 8), (5, 5)))]
)
def test_positions_are_the_librarys(size: tuple[int, int], references: tuple[tuple[int, int], ...]) -> None:
    """Text first, then the picture, then what it refers to."""
    config, num_text = read_config(TRANSFORMER / "config.json"), 11
    library = QwenEmbedRope(10_000, list(config.axes_dims_rope), scale_rope=True)
    image, text = library([[(1, *one) for one in (size, *references)]], torch.device("cpu"), num_text)
    cos, sin = rope(config, *size, num_text, references)
    expected = torch.cat([text, image])
    torch.testing.assert_close(cos, expected.real, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sin, expected.imag, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("transformer/config.json", {"out_channels": 32}, "in_channels 64 must be four times out_channels 32"),
        ("transformer/config.json", {"axes_dims_rope": [16, 56, 58]}, r"axes_dims_rope .* attention_head_dim 128"),
        ("transformer/config.json", {"axes_dims_rope": [15, 57, 56]}, "must be even"),
        ("transformer/config.json", {"guidance_embeds": True}, "guidance_embeds"),
        ("transformer/config.json", {"use_layer3d_rope": True}, "use_layer3d_rope"),
        ("transformer/config.json", {"use_additional_t_cond": True}, "use_additional_t_cond"),
        ("transformer/config.json", {"patch_size": 1}, "patch_size"),
        ("transformer/config.json", {"joint_attention_dim": 2048}, "hidden_size 3584.*joint_attention_dim 2048"),
        ("transformer/config.json", {"in_channels": 32, "out_channels": 8}, "z_dim 16"),
        ("vae/config.json", {"z_dim": 8}, "latents_mean"),
        ("text_encoder/config.json", {"model_type": "qwen2"}, "model_type must be 'qwen2_5_vl'"),
        ("scheduler/scheduler_config.json", {"shift_terminal": -0.1}, "shift_terminal"),
        ("model_index.json", {"text_encoder": ["transformers", "Qwen2Model"]}, "text_encoder"),
        ("preset.json", {"max_text_tokens": 2000}, "max_text_tokens 2000 must be at most 1024"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(folder: Path, name: str, fields: dict[str, object], says: str) -> None:
    read_model_spec(folder, "dummy")
    change(folder, name, **fields)
    with pytest.raises(CheckpointError, match=says):
        read_model_spec(folder, "dummy")


LANGUAGE = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6, "vocab_size": 152064,
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, None),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, None),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling"),
        ({"rope_scaling": {"mrope_section": [16, 24]}}, "mrope_section"),
        ({"rope_scaling": {"mrope_section": [16, 24, 25]}}, "mrope_section .* must add up to half"),
        ({"num_attention_heads": 27, "num_key_value_heads": 1}, "num_attention_heads 27 must divide hidden_size"),
        ({"max_position_embeddings": 1000}, "max_position_embeddings 1000 must be at least 1058"),
        ({"use_sliding_window": True}, "use_sliding_window"),
    ],
)
@pytest.mark.parametrize("is_flat", [True, False])
def test_the_language_models_config_is_looked_at(
    folder: Path, fields: dict[str, object], says: str | None, is_flat: bool
) -> None:
    """Old checkpoints have its fields beside those of the whole, new ones in a part."""
    language = LANGUAGE | fields
    change(
        folder,
        "text_encoder/config.json",
        **({"text_config": None} | language if is_flat else {"text_config": language}),
    )
    if says is None:
        assert read_model_spec(folder, "dummy").family == "qwenimage"
    else:
        with pytest.raises(CheckpointError, match=says):
            read_model_spec(folder, "dummy")


def test_the_form_describes_an_image() -> None:
    before, after = CHAT.of("a cat").split("a cat")
    assert before.startswith("<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, ")
    assert before.endswith("spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n")
    assert after == "<|im_end|>\n<|im_start|>assistant\n"
