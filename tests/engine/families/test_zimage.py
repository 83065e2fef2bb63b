"""What the engine reads of Z-Image's checkpoints, what Z-Image takes of a request, its weights at real sizes."""

import math
from pathlib import Path

import pytest

from tests.engine.families.folders import change, copied
from tetrion.engine.errors import RequestError
from tetrion.engine.families.checkpoint import embedded_folder
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.families.zimage import CHAT, read_config, weights_plan
from tetrion.engine.model_spec import CheckpointError, ModelSpec
from tetrion.engine.models.dummy import DummyFiles
from tetrion.engine.models.loading import Component, planned_shapes
from tetrion.engine.models.zimage import rope, transformer_shapes
from tetrion.engine.request import ImageRequest
from tetrion.engine.resolve import resolve_request

TRANSFORMER = embedded_folder() / "z-image" / "transformer"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copied("z-image", tmp_path / "copy")


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return read_model_spec(embedded_folder() / "z-image", "dummy")


@pytest.mark.parametrize(("name", "num_steps", "guidance"), [("z-image", 50, 5.0), ("z-image-turbo", 8, 0.0)])
@pytest.mark.parametrize("with_preset", [True, False])
def test_published_models_have_their_defaults(
    name: str, num_steps: int, guidance: float, with_preset: bool, tmp_path: Path
) -> None:
    """Without a preset file they follow from the scheduler."""
    folder = copied(name, tmp_path / name)
    if not with_preset:
        (folder / "preset.json").unlink()
    spec = read_model_spec(folder, "dummy")
    assert (spec.name, spec.family, spec.num_steps, spec.guidance) == (name, "zimage", num_steps, guidance)
    assert (spec.num_heads, spec.head_dim, spec.max_text_tokens) == (30, 128, 512)
    assert (spec.sizes.default, spec.sizes.max, spec.sizes.multiple) == ((1024, 1024), 2048, 16)


def test_the_real_transformer_has_its_size_and_every_tensor_is_used() -> None:
    shapes = transformer_shapes(TRANSFORMER)
    assert sum(map(math.prod, shapes.values())) / 1e9 == pytest.approx(6.155, abs=0.001)
    plan = weights_plan(read_config(TRANSFORMER / "config.json"))
    assert {source for part in plan.values() for source in part.sources} == set(shapes)
    planned = planned_shapes({"transformer": Component(DummyFiles(TRANSFORMER, shapes), plan)})
    assert sum(map(math.prod, planned.values())) == sum(map(math.prod, shapes.values()))


@pytest.mark.parametrize(
    ("words", "rows"), [(1, 32), (31, 32), (32, 64), (200, 224), (510, 512), (511, 512), (4000, 512)]
)
def test_a_text_has_as_many_rows_as_its_prompt(spec: ModelSpec, words: int, rows: int) -> None:
    """Filled up to a multiple of 32; without a tokenizer a prompt has a token for each word and one for its end."""
    request = ImageRequest(prompt="x " * words, negative_prompt="a b c", width=512, height=256)
    assert resolve_request(request, spec, 1).params.shape.text == (rows, 32)


@pytest.mark.parametrize(("size", "rows"), [((1024, 1024), 4096), ((528, 272), 576), ((528, 288), 608)])
def test_rows_of_the_picture_are_filled_up(spec: ModelSpec, size: tuple[int, int], rows: int) -> None:
    request = ImageRequest(prompt="x", width=size[0], height=size[1])
    assert resolve_request(request, spec, 1).params.shape.image == rows
    assert spec.sizes.num_covered(*size) == (size[0] // 16) * (size[1] // 16) <= rows


@pytest.mark.parametrize(("guidance", "num_branches"), [(None, 2), (0.5, 2), (0.0, 1)])
def test_guidance_above_0_takes_two_branches(spec: ModelSpec, guidance: float | None, num_branches: int) -> None:
    request = ImageRequest(prompt="x", guidance=guidance)
    assert resolve_request(request, spec, 1).params.shape.num_branches == num_branches


def test_a_negative_prompt_is_taken_with_guidance_only(spec: ModelSpec) -> None:
    resolve_request(ImageRequest(prompt="x", negative_prompt="y"), spec, 1)
    with pytest.raises(RequestError, match="negative_prompt: takes a guidance above 0"):
        resolve_request(ImageRequest(prompt="x", negative_prompt="y", guidance=0.0), spec, 1)


def test_positions_begin_behind_the_text(spec: ModelSpec) -> None:
    """(1 … T, 0, 0), then (T + 1, row, column), then the origin."""
    config = read_config(TRANSFORMER / "config.json")
    cos, sin = rope(config, rows=3, columns=5, num_image=32, num_text=64)
    assert cos.shape == sin.shape == (96, 64)
    first = [float(angle) for angle in sin[:, 0].asin()]
    assert sin[32:, 16:].eq(0).all() and sin[15:32].eq(0).all()
    assert first[32] == pytest.approx(1.0) and math.sin(65) == pytest.approx(float(sin[0, 0]), abs=1e-6)
    assert float(sin[7, 16]) == pytest.approx(math.sin(1), abs=1e-6)  # row 1
    assert float(sin[7, 40]) == pytest.approx(math.sin(2), abs=1e-6)  # column 2


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("transformer/config.json", {"n_kv_heads": 10}, "n_kv_heads 10 must equal n_heads 30"),
        ("transformer/config.json", {"axes_dims": [32, 48, 50]}, r"axes_dims .* must add up to dim / n_heads"),
        ("transformer/config.json", {"axes_dims": [31, 48, 49]}, "must be even"),
        ("transformer/config.json", {"qk_norm": False}, "qk_norm"),
        ("transformer/config.json", {"all_patch_size": [2, 4]}, "all_patch_size"),
        ("transformer/config.json", {"siglip_feat_dim": 1152}, "siglip_feat_dim"),
        ("transformer/config.json", {"cap_feat_dim": 2048}, "hidden_size 2560.*cap_feat_dim 2048"),
        ("transformer/config.json", {"in_channels": 4}, "latent_channels 16"),
        ("transformer/config.json", {"axes_lens": [256, 512, 512]}, "max_text_tokens 512 must be below axes_lens 256"),
        ("transformer/config.json", {"axes_lens": [1536, 512, 64]}, "max_size 2048 is beyond the 1024 pixels"),
        ("preset.json", {"max_text_tokens": 500}, "max_text_tokens 500 must be a multiple of 32"),
        ("text_encoder/config.json", {"model_type": "qwen2"}, "model_type must be 'qwen3'"),
        ("text_encoder/config.json", {"num_hidden_layers": 1}, "num_hidden_layers 1 must be at least 2"),
        ("text_encoder/config.json", {"max_position_embeddings": 100}, "max_position_embeddings 100 must be at least"),
        ("text_encoder/config.json", {"num_key_value_heads": 5}, "num_key_value_heads 5 must divide"),
        ("text_encoder/config.json", {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling"),
        ("text_encoder/config.json", {"attention_bias": True}, "attention_bias"),
        ("text_encoder/config.json", {"layer_types": ["sliding_attention"] * 36}, "layer_types"),
        ("model_index.json", {"text_encoder": ["transformers", "Qwen2Model"]}, "text_encoder"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(folder: Path, name: str, fields: dict[str, object], says: str) -> None:
    read_model_spec(folder, "dummy")
    change(folder, name, **fields)
    with pytest.raises(CheckpointError, match=says):
        read_model_spec(folder, "dummy")


def test_the_chat_is_qwens_with_room_to_think() -> None:
    assert CHAT.of("a cat") == "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n"
