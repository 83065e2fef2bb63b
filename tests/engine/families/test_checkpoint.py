"""Checkpoint folders as families read them: what is missing, what is not supported, what is shared."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tetrion.engine.families.checkpoint import component_folder, embedded_folder, read_json
from tetrion.engine.families.registry import FAMILIES, family_of, read_model_spec
from tetrion.engine.measure.checkpoint_identity import checkpoint_identity
from tetrion.engine.model_spec import CheckpointError

FILES: dict[str, dict[str, Any]] = {
    "model_index.json": {"_class_name": "FluxPipeline"},
    "scheduler/scheduler_config.json": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    "transformer/config.json": {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": 32,
        "in_channels": 16,
        "joint_attention_dim": 24,
        "axes_dims_rope": [8, 12, 12],
        "num_attention_heads": 3,
        "num_layers": 1,
        "num_single_layers": 1,
        "pooled_projection_dim": 20,
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [8, 16, 16, 16],
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "latent_channels": 4,
        "norm_num_groups": 4,
    },
    "text_encoder/config.json": {"model_type": "clip_text_model", "hidden_size": 20, "num_attention_heads": 2},
    "text_encoder_2/config.json": {"model_type": "t5", "d_model": 24},
}


def write(folder: Path, **changes: dict[str, Any] | None) -> Path:
    """The files above; `changes`: of a file by its component, None: without it."""
    for name, content in FILES.items():
        change = changes.get(name.partition("/")[0].removesuffix(".json"), {})
        if change is not None:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(msgspec.json.encode(content | change))
    return folder


def test_a_spec_says_what_the_engine_must_know(tmp_path: Path) -> None:
    spec = read_model_spec(write(tmp_path / "tiny"), "dummy")
    assert (spec.name, spec.family, spec.num_heads, spec.head_dim) == ("tiny", "flux", 3, 32)
    assert {field.name: (field.rows, field.width, field.changes) for field in spec.fields} == {
        "text": ("text", 96, False),
        "pooled": ("one", 20, False),
        "latents": ("image", 16, True),
    }
    assert (spec.num_steps, spec.guidance, spec.max_text_tokens) == (4, 0.0, 256), "as FLUX.1-schnell"
    assert (spec.sizes.multiple, spec.sizes.default, spec.max_rows("image")) == (16, (1024, 1024), 128 * 128)
    assert spec.sizes.accept(256) and not spec.sizes.accept(264) and not spec.sizes.accept(4096)
    assert msgspec.json.decode(msgspec.json.encode(spec), type=type(spec)) == spec
    dev = write(tmp_path / "dev", transformer={"guidance_embeds": True})
    assert read_model_spec(dev, "dummy").guidance == 3.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_index": None}, "is missing model_index.json"),
        (
            {"model_index": {"_class_name": "OtherPipeline"}},
            "'OtherPipeline' is not supported .supported: FluxPipeline",
        ),
        ({"vae": None, "scheduler": None}, "is missing scheduler/scheduler_config.json, vae/config.json"),
        ({"scheduler": {"_class_name": "DDIM"}}, "scheduler 'DDIM' is not supported"),
        ({"scheduler": {"use_karras_sigmas": True}}, "scheduler option use_karras_sigmas is not supported"),
        ({"scheduler": {"shift": "much"}}, "scheduler_config.json': Expected `float`"),
        ({"transformer": {"_class_name": "Other"}}, "transformer 'Other' is not supported"),
        ({"transformer": {"in_channels": "many"}}, "transformer/config.json': Expected `int`"),
        ({"vae": {"_class_name": "AutoencoderTiny"}}, "vae 'AutoencoderTiny' is not supported"),
    ],
)
def test_the_first_thing_that_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_model_spec(write(tmp_path, **changes), "dummy")


def test_weights_are_asked_for_unless_they_are_drawn(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer_2/tokenizer_config.json, .*transformer/.*configs only"):
        read_model_spec(write(tmp_path))
    with pytest.raises(CheckpointError, match="is not a folder"):
        read_model_spec(tmp_path / "nowhere")


def test_components_of_another_embedded_model_are_used_in_place(tmp_path: Path) -> None:
    preset = {"components_from": {"vae": "shapes/vae", "text_encoder_2": "shapes/text_encoder_2"}}
    fitting = {"in_channels": 32, "joint_attention_dim": 128}
    folder = write(tmp_path / "own", transformer=fitting, vae=None, text_encoder_2=None)
    (folder / "preset.json").write_bytes(msgspec.json.encode(preset))
    assert component_folder(folder, "vae") == embedded_folder() / "shapes" / "vae"
    assert component_folder(folder, "transformer") == folder / "transformer"
    assert read_json(folder, "vae/config.json")["_class_name"] == "AutoencoderKL"
    assert read_model_spec(folder, "dummy").num_heads == 3
    other = write(tmp_path / "other", transformer=fitting, vae=None, text_encoder_2=None)
    (other / "preset.json").write_bytes(msgspec.json.encode(preset | {"components_from": {"vae": "shapes/vae"}}))
    assert checkpoint_identity(folder, "dummy") != checkpoint_identity(other, "dummy")


@pytest.mark.parametrize("source", ["shapes", "../models/shapes/vae", "shapes/../flux1-dev", "/etc/ssl", "shapes/none"])
def test_only_components_of_embedded_models_are_shared(tmp_path: Path, source: str) -> None:
    folder = write(tmp_path, vae=None)
    (folder / "preset.json").write_bytes(msgspec.json.encode({"components_from": {"vae": source}}))
    with pytest.raises(CheckpointError, match=r"components_from: vae: expected \"model/component\""):
        read_model_spec(folder, "dummy")


@pytest.mark.parametrize("name", sorted(set(FAMILIES.values())))
def test_the_engines_side_of_a_family_takes_no_torch(name: str) -> None:
    script = f"import sys; import tetrion.engine.families.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", script], check=False).returncode == 0
    assert family_of(name)
