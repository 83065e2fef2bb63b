"""What the engine reads of Qwen-Image-2.1's checkpoints, what it takes of a request, its weights at real sizes."""

import math
from pathlib import Path

import pytest
import torch

from tests.engine.families.folders import change, copied
from tetrion.engine.errors import RequestError
from tetrion.engine.families.checkpoint import embedded_folder
from tetrion.engine.families.components import read_part
from tetrion.engine.families.qwen_image21_vae import VAE_CLASS, QwenImage21VaeConfig, decoder_shapes, encoder_shapes
from tetrion.engine.families.qwenimage21 import CHAT, SYSTEM, read_config, weights_plan
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.model_spec import CheckpointError, ModelSpec
from tetrion.engine.models.dummy import DummyFiles
from tetrion.engine.models.loading import Component, planned_shapes
from tetrion.engine.models.memory_budget import memory_budget
from tetrion.engine.models.qwenimage21 import QwenImage21Codec, rope, schedule, transformer_shapes
from tetrion.engine.models.recording import Attention, Gemm, step_operators
from tetrion.engine.models.registry import all_components
from tetrion.engine.parallel.layout import slab_layout
from tetrion.engine.request import ImageRequest
from tetrion.engine.resolve import resolve_request

FOLDER = embedded_folder() / "qwen-image-2.1"
TRANSFORMER = FOLDER / "transformer"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copied("qwen-image-2.1", tmp_path / "copy")


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return read_model_spec(FOLDER, "dummy")


@pytest.mark.parametrize(("name", "num_steps"), [("qwen-image-2.1", 40), ("qwen-image-2.1-turbo", 8)])
def test_published_models_have_their_defaults(name: str, num_steps: int) -> None:
    spec = read_model_spec(embedded_folder() / name, "dummy")
    assert (spec.name, spec.family, spec.num_steps, spec.guidance) == (name, "qwenimage21", num_steps, 1.0)
    assert (spec.num_heads, spec.head_dim, spec.prefix_blocks, spec.max_text_tokens) == (32, 128, 32, 1024)
    assert (spec.sizes.default, spec.sizes.max, spec.sizes.multiple) == ((1024, 1024), 2048, 32)
    assert spec.shape(1024, 512).image == 64 * 32


def test_the_real_transformer_has_its_size_and_every_tensor_is_used() -> None:
    shapes = transformer_shapes(TRANSFORMER)
    assert sum(map(math.prod, shapes.values())) / 1e9 == pytest.approx(7.115, abs=0.001)
    plan = weights_plan(read_config(TRANSFORMER / "config.json"))
    assert {source for part in plan.values() for source in part.sources} == set(shapes)
    planned = planned_shapes({"transformer": Component(DummyFiles(TRANSFORMER, shapes), plan)})
    assert sum(map(math.prod, planned.values())) == sum(map(math.prod, shapes.values()))


def test_both_halves_of_the_autoencoder_are_the_librarys() -> None:
    config = read_part(FOLDER / "vae", QwenImage21VaeConfig, VAE_CLASS)
    assert decoder_shapes(config) | encoder_shapes(config) == QwenImage21Codec.shapes(FOLDER / "vae")


def test_a_step_works_on_the_image_alone(spec: ModelSpec) -> None:
    """Text has keys and values only, at any degree, so that no GEMM of a step grows with it."""
    for degree in (1, 4):
        operators = step_operators(spec, spec.shape(1024, 1024), degree)
        assert {it.rows for it in operators if isinstance(it, Gemm)} == {4096 // degree}
        attentions = [it for it in operators if isinstance(it, Attention)]
        assert attentions == [Attention(4096, 32 // degree, 128, prefix=1024)] * 32


def test_keys_and_values_of_texts_are_in_the_memory_budget(spec: ModelSpec) -> None:
    """Half a megabyte a row; of four branches that are kept, and of the two that step."""
    budget = memory_budget([spec], all_components([spec], "dummy"), slab_layout([spec], 2, 4, itemsize=2))
    assert budget.prefix_bytes == 6 * 1024 * 2**19
    assert "keys and values of texts 3.2 GB" in budget.describe()


@pytest.mark.parametrize(("words", "rows"), [(1, 2), (31, 32), (1023, 1024), (4000, 1024)])
def test_a_text_has_as_many_rows_as_its_prompt(spec: ModelSpec, words: int, rows: int) -> None:
    """Without a tokenizer a prompt has a token for each word and one for its end; what is dropped is in front of it."""
    request = ImageRequest(prompt="x " * words, negative_prompt="a b c", guidance=4.0)
    assert resolve_request(request, spec, 1).params.shape.text == (rows, 4)


@pytest.mark.parametrize(
    ("guidance", "negative", "num_branches"), [(None, None, 1), (4.0, None, 1), (4.0, "", 2), (4.0, "grey", 2)]
)
def test_guidance_takes_a_negative_prompt(
    spec: ModelSpec, guidance: float | None, negative: str | None, num_branches: int
) -> None:
    request = ImageRequest(prompt="x", guidance=guidance, negative_prompt=negative)
    assert resolve_request(request, spec, 1).params.shape.num_branches == num_branches


def test_a_negative_prompt_is_taken_with_guidance_only(spec: ModelSpec) -> None:
    with pytest.raises(RequestError, match="negative_prompt: takes a guidance above 1"):
        resolve_request(ImageRequest(prompt="x", negative_prompt="y"), spec, 1)


def test_positions_are_counted_from_the_middle_behind_the_text() -> None:
    """(7, row − 2, column − 3) of 3 × 5 tokens, then (i, i, i) of the text."""
    cos, sin = rope(read_config(TRANSFORMER / "config.json"), rows=3, columns=5, num_text=7)
    assert cos.shape == sin.shape == (3 * 5 + 7, 64)
    first_of_axes = sin[:, [0, 8, 36]]
    positions = torch.tensor([[7.0, 1 - 2, 4 - 3], [7.0, 2 - 2, 0 - 3], [6.0, 6.0, 6.0]])
    torch.testing.assert_close(first_of_axes[[9, 10, 21]], positions.sin())


def test_listed_noise_levels_hold_for_as_many_steps(folder: Path) -> None:
    (folder / "preset.json").unlink()
    change(folder, "model_index.json", sample_sigmas=[1.0, 0.8, 0.3])
    change(folder, "scheduler/scheduler_config.json", use_dynamic_shifting=False, shift_terminal=None)
    spec = read_model_spec(folder, "dummy")
    assert spec.num_steps == 3
    shape = spec.shape(256, 256)
    assert schedule(spec, 3, shape).levels.tolist() == pytest.approx([1.0, 0.8, 0.3])
    assert schedule(spec, 4, shape).levels.tolist() == pytest.approx([1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("transformer/config.json", {"causal_condition": False}, "causal_condition false"),
        ("transformer/config.json", {"eps": 1e-5}, "eps 1e-05 is not supported"),
        ("transformer/config.json", {"patch_size": 2}, "patch_size"),
        ("transformer/config.json", {"out_channels": 16}, "out_channels 16 must equal in_channels 64"),
        ("transformer/config.json", {"axes_dims_rope": [16, 56, 58]}, "add up to attention_head_dim 128"),
        ("transformer/config.json", {"context_in_dim": 2048}, "hidden_size 4096.*context_in_dim 2048"),
        ("vae/config.json", {"z_dim": 16}, "must be as many as z_dim 16"),
        ("vae/config.json", {"is_residual": False}, "is_residual"),
        ("vae/config.json", {"dim_mult": [1, 2, 4]}, "dim_mult"),
        ("vae/config.json", {"patch_size": 2}, "patch_size"),
        ("text_encoder/config.json", {"model_type": "qwen3"}, "model_type must be 'qwen3_vl'"),
        ("model_index.json", {"sample_sigmas": [0.5, 0.9]}, "sample_sigmas .* must fall"),
        ("model_index.json", {"sample_sigmas": [1.5]}, "sample_sigmas"),
        ("model_index.json", {"processor": ["transformers", "Qwen2VLProcessor"]}, "processor"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(folder: Path, name: str, fields: dict[str, object], says: str) -> None:
    read_model_spec(folder, "dummy")
    change(folder, name, **fields)
    with pytest.raises(CheckpointError, match=says):
        read_model_spec(folder, "dummy")


def test_the_chat_begins_with_what_is_dropped() -> None:
    assert CHAT.of("a {cat}") == (
        "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
        "<|im_start|>user\na {cat}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert CHAT.before.startswith(SYSTEM) and SYSTEM.endswith("<|im_end|>\n")
