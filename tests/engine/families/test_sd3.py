"""What the engine reads of SD3's checkpoints, and what SD3 takes of a request."""

import json
import shutil
from pathlib import Path

import pytest

from tetrion.engine.errors import RequestError
from tetrion.engine.families.checkpoint import embedded_folder
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.families.sd3 import FAMILY, has_t5
from tetrion.engine.model_spec import CheckpointError, ModelSpec
from tetrion.engine.request import ImageRequest
from tetrion.engine.resolve import resolve_request


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of SD3-medium's configs that a test may change."""
    return Path(shutil.copytree(embedded_folder() / "sd3-medium", tmp_path / "copy"))


def change(folder: Path, name: str, **fields: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_bytes()) | fields))


@pytest.fixture
def spec() -> ModelSpec:
    return read_model_spec(embedded_folder() / "sd3-medium", "dummy")


@pytest.mark.parametrize(
    ("name", "heads", "guidance"), [("sd3-medium", 24, 7.0), ("sd3.5-medium", 24, 4.5), ("sd3.5-large", 38, 3.5)]
)
@pytest.mark.parametrize("with_preset", [True, False])
def test_published_models_have_their_defaults(
    name: str, heads: int, guidance: float, with_preset: bool, tmp_path: Path
) -> None:
    """Without a preset file they follow from the transformer's config."""
    folder = Path(shutil.copytree(embedded_folder() / name, tmp_path / name))
    if not with_preset:
        (folder / "preset.json").unlink()
    spec = read_model_spec(folder, "dummy")
    assert (spec.name, spec.family, spec.num_heads, spec.guidance, spec.num_steps) == (name, "sd3", heads, guidance, 28)
    assert (spec.sizes.default, spec.sizes.max, spec.sizes.multiple) == ((1024, 1024), 2048, 16)
    assert (spec.max_text_tokens, spec.fields[0].width) == (77 + 256, 64 * heads)
    assert [field.width for field in spec.fields[1:]] == [2048, 64]


@pytest.mark.parametrize(("guidance", "num_branches"), [(None, 2), (1.5, 2), (1.0, 1), (0.0, 1)])
def test_guidance_above_1_takes_two_branches(spec: ModelSpec, guidance: float | None, num_branches: int) -> None:
    request = ImageRequest(prompt="x", width=512, height=256, guidance=guidance)
    shape = resolve_request(request, spec, 1).params.shape
    assert (shape.image, shape.text) == (512, (333,) * num_branches)


def test_a_negative_prompt_is_taken_with_guidance_only(spec: ModelSpec) -> None:
    resolve_request(ImageRequest(prompt="x", negative_prompt="y"), spec, 1)
    with pytest.raises(RequestError, match="negative_prompt: takes a guidance above 1"):
        resolve_request(ImageRequest(prompt="x", negative_prompt="y", guidance=1.0), spec, 1)
    with pytest.raises(RequestError, match="true_cfg_scale: is no input of model 'sd3-medium'"):
        resolve_request(ImageRequest(prompt="x", true_cfg_scale=2.0), spec, 1)


def test_heads_need_not_divide(tmp_path: Path) -> None:
    spec = read_model_spec(embedded_folder() / "sd3.5-large", "dummy")
    assert {1, 2, 4, 8} <= set(spec.legal_degrees(8, 2))


def test_without_a_t5_its_folder_is_not_needed_and_its_rows_stay(folder: Path) -> None:
    assert has_t5(folder)
    change(folder, "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    shutil.rmtree(folder / "text_encoder_3")
    assert not has_t5(folder)
    assert read_model_spec(folder, "dummy").max_text_tokens == 333


def test_a_t5_that_the_index_names_must_be_there(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder_3")
    with pytest.raises(CheckpointError, match=r"is missing text_encoder_3/config\.json"):
        read_model_spec(folder, "dummy")


def test_pictures_stay_within_the_table_of_positions(folder: Path) -> None:
    change(folder, "transformer/config.json", pos_embed_max_size=64)
    with pytest.raises(CheckpointError, match="max_size 2048 is beyond the 1024 pixels of pos_embed_max_size 64"):
        read_model_spec(folder, "dummy")
    (folder / "preset.json").unlink()
    assert read_model_spec(folder, "dummy").sizes.max == 1024


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("transformer/config.json", {"num_attention_heads": 0}, "num_attention_heads"),
        ("transformer/config.json", {"pos_embed_max_size": None}, "pos_embed_max_size"),
        ("transformer/config.json", {"_class_name": "Other"}, "transformer 'Other' is not supported"),
        ("vae/config.json", {"block_out_channels": []}, "block_out_channels"),
        (
            "text_encoder/config.json",
            {"max_position_embeddings": "long"},
            "got `str` - at .*max_position_embeddings",
        ),
    ],
)
def test_what_is_not_covered_is_refused_by_name(
    folder: Path, file: str, fields: dict[str, object], message: str
) -> None:
    change(folder, file, **fields)
    with pytest.raises(CheckpointError, match=message):
        read_model_spec(folder, "dummy")


def test_it_is_read_without_torch() -> None:
    import subprocess
    import sys

    code = "import sys; from tetrion.engine.families import sd3; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0


def test_it_is_a_family() -> None:
    assert FAMILY.read(embedded_folder() / "sd3-medium", "dummy").inputs == {"negative_prompt", "pictures", "strength"}
