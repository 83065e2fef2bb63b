"""What the engine reads of Krea 2's checkpoints, what Krea 2 takes of a request, its weights at real sizes."""

import math
from pathlib import Path

import pytest

from tests.engine.families.folders import change, copied
from tests.engine.families.pipelines import Krea2
from tetrion.engine.errors import RequestError
from tetrion.engine.families.checkpoint import embedded_folder
from tetrion.engine.families.krea2 import CHAT, NUM_BEHIND, NUM_DROPPED, read_config, weights_plan
from tetrion.engine.families.prompts import PromptReader
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.model_spec import CheckpointError, ModelSpec
from tetrion.engine.models.dummy import DummyFiles
from tetrion.engine.models.krea2 import rope, schedule, transformer_shapes
from tetrion.engine.models.loading import Component, planned_shapes
from tetrion.engine.models.recording import Attention, Gemm, step_operators
from tetrion.engine.request import ImageRequest
from tetrion.engine.resolve import resolve_request

TRANSFORMER = embedded_folder() / "krea-2" / "transformer"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copied("krea-2", tmp_path / "copy")


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return read_model_spec(embedded_folder() / "krea-2", "dummy")


@pytest.mark.parametrize(("name", "num_steps", "guidance"), [("krea-2", 28, 4.5), ("krea-2-turbo", 8, 0.0)])
@pytest.mark.parametrize("with_preset", [True, False])
def test_published_models_have_their_defaults(
    name: str, num_steps: int, guidance: float, with_preset: bool, tmp_path: Path
) -> None:
    """Without a preset file they follow from `is_distilled`."""
    folder = copied(name, tmp_path / name)
    if not with_preset:
        (folder / "preset.json").unlink()
    spec = read_model_spec(folder, "dummy")
    assert (spec.name, spec.family, spec.num_steps, spec.guidance) == (name, "krea2", num_steps, guidance)
    assert (spec.num_heads, spec.num_key_heads, spec.head_dim, spec.max_text_tokens) == (48, 12, 128, 512)
    assert (spec.sizes.default, spec.sizes.max, spec.sizes.multiple) == ((1024, 1024), 2048, 16)


def test_the_real_transformer_has_its_size_and_every_tensor_is_used() -> None:
    shapes = transformer_shapes(TRANSFORMER)
    assert sum(map(math.prod, shapes.values())) / 1e9 == pytest.approx(12.9, abs=0.1)
    plan = weights_plan(read_config(TRANSFORMER / "config.json"))
    assert {source for part in plan.values() for source in part.sources} == set(shapes)
    planned = planned_shapes({"transformer": Component(DummyFiles(TRANSFORMER, shapes), plan)})
    assert sum(map(math.prod, planned.values())) == sum(map(math.prod, shapes.values()))


def test_degrees_follow_the_heads_of_keys(spec: ModelSpec) -> None:
    """12 on 5 devices are 3 on the fullest, as on 4."""
    assert spec.legal_degrees(8) == (1, 2, 3, 4, 6, 7)
    assert spec.legal_degrees(8, num_branches=2) == (1, 2, 3, 4, 6, 7, 8)


@pytest.mark.parametrize("degree", [1, 4])
def test_a_step_computes_what_the_network_means(spec: ModelSpec, degree: int) -> None:
    """At 1024²: queries, keys, values and the gate in one GEMM of each block, attention of whole groups of heads."""
    shape = spec.shape(1024, 1024)
    operators = step_operators(spec, shape, degree)
    attentions = [operator for operator in operators if isinstance(operator, Attention)]
    assert attentions == [Attention(512 + 4096, 48 // degree, 128, 4)] * 28
    rows = 4608 // degree
    gemms = [operator for operator in operators if isinstance(operator, Gemm)]
    assert gemms.count(Gemm(rows, 6144, (48 + 12 + 12 + 48) * 128)) == 28
    assert gemms.count(Gemm(rows, 6144, 2 * 16384)) == gemms.count(Gemm(rows, 16384, 6144)) == 28


@pytest.mark.parametrize(("words", "rows"), [(1, 2), (31, 32), (511, 512), (4000, 512)])
def test_a_text_has_as_many_rows_as_its_prompt(spec: ModelSpec, words: int, rows: int) -> None:
    """Without a tokenizer a prompt has a token for each word and one for its end."""
    request = ImageRequest(prompt="x " * words, negative_prompt="a b c", width=512, height=256)
    assert resolve_request(request, spec, 1).params.shape.text == (rows, 4)


def test_a_prompt_that_is_too_long_is_cut_in_front_of_the_forms_end(tmp_path: Path) -> None:
    Krea2("krea-2", {}, guidance=0.0).tokenizer().save_pretrained(tmp_path)
    reader = PromptReader(tmp_path, CHAT, 400, NUM_DROPPED + 256, NUM_DROPPED, keeps_end=True)
    whole, cut = reader.read("a cat"), reader.read("a cat " * 200)
    assert len(whole.ids) == whole.num_tokens < NUM_DROPPED + 256 == len(cut.ids) < cut.num_tokens
    assert cut.ids[-NUM_BEHIND:] == whole.ids[-NUM_BEHIND:]
    assert cut.ids[: len(whole.ids) - NUM_BEHIND] == whole.ids[:-NUM_BEHIND]


@pytest.mark.parametrize(("guidance", "num_branches"), [(None, 2), (0.5, 2), (0.0, 1)])
def test_guidance_above_0_takes_two_branches(spec: ModelSpec, guidance: float | None, num_branches: int) -> None:
    request = ImageRequest(prompt="x", guidance=guidance)
    assert resolve_request(request, spec, 1).params.shape.num_branches == num_branches


def test_a_negative_prompt_is_taken_with_guidance_only(spec: ModelSpec) -> None:
    resolve_request(ImageRequest(prompt="x", negative_prompt="y"), spec, 1)
    with pytest.raises(RequestError, match="negative_prompt: takes a guidance above 0"):
        resolve_request(ImageRequest(prompt="x", negative_prompt="y", guidance=0.0), spec, 1)


def test_turbos_noise_levels_are_those_of_any_size(spec: ModelSpec) -> None:
    small, large = (spec.shape(side, side) for side in (256, 2048))
    assert schedule(spec, True, 8, small).levels.equal(schedule(spec, True, 8, large).levels)
    assert not schedule(spec, False, 8, small).levels.equal(schedule(spec, False, 8, large).levels)


def test_text_is_at_the_origin() -> None:
    cos, sin = rope(read_config(TRANSFORMER / "config.json"), rows=3, columns=5, num_text=7)
    assert cos.shape == sin.shape == (22, 64)
    assert sin[:8].eq(0).all() and sin[:, :16].eq(0).all()
    row, column = 16, 40
    assert float(sin[7 + 5, row]) == pytest.approx(math.sin(1)) and float(sin[7 + 2, column]) == pytest.approx(
        math.sin(2)
    )


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("transformer/config.json", {"num_key_value_heads": 7}, "num_key_value_heads 7 must divide"),
        ("transformer/config.json", {"text_num_attention_heads": 12}, "text_num_key_value_heads 20 must divide"),
        ("transformer/config.json", {"text_hidden_dim": 2570}, "text_num_attention_heads 20 must divide"),
        ("transformer/config.json", {"axes_dims_rope": [32, 48, 50]}, "axes_dims_rope .* add up to"),
        ("transformer/config.json", {"timestep_embed_dim": 128}, "timestep_embed_dim"),
        ("transformer/config.json", {"num_text_layers": 11}, "text_encoder_select_layers 12 .* num_text_layers 11"),
        ("transformer/config.json", {"text_hidden_dim": 2048, "text_num_attention_heads": 16,
                                     "text_num_key_value_heads": 16}, "hidden_size 2560.*text_hidden_dim 2048"),
        ("transformer/config.json", {"in_channels": 16}, "z_dim 16"),
        ("model_index.json", {"text_encoder_select_layers": [0, *range(2, 13)]}, "text_encoder_select_layers"),
        ("model_index.json", {"text_encoder_select_layers": [*range(2, 13), 36]}, "num_hidden_layers 36 must be at"),
        ("model_index.json", {"patch_size": 1}, "patch_size"),
        ("model_index.json", {"is_distilled": "yes"}, "is_distilled"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderKL"]}, "vae"),
        ("preset.json", {"max_text_tokens": 5}, "max_text_tokens 5 must be more than 5"),
        ("text_encoder/config.json", {"model_type": "qwen3"}, "model_type must be 'qwen3_vl'"),
    ],
)  # fmt: skip
def test_what_is_not_covered_is_refused_by_name(folder: Path, name: str, fields: dict[str, object], says: str) -> None:
    read_model_spec(folder, "dummy")
    change(folder, name, **fields)
    with pytest.raises(CheckpointError, match=says):
        read_model_spec(folder, "dummy")
