"""The shipped SD3-class folder: its size, what it takes from `shapes`, and that it draws with diffusers."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from benchmarks.embedded_model.architecture_sd3 import encode
from benchmarks.embedded_model.export import borrowed_components, check_sizes, load, read_preset

FOLDER = Path(__file__).parents[2] / "configs/models/shapes-sd3"
MAX_BYTES = 16 * 2**20


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    return load(FOLDER)


def test_size():
    assert check_sizes(FOLDER) <= MAX_BYTES


def test_every_component_is_here_or_borrowed():
    index = json.loads((FOLDER / "model_index.json").read_text())
    components = {name for name, (library, _) in ((k, v) for k, v in index.items() if isinstance(v, list)) if library}
    here = {folder.name for folder in FOLDER.iterdir() if folder.is_dir() and folder.name != "__pycache__"}
    borrowed = set(borrowed_components(read_preset(FOLDER)))
    assert components == here | borrowed and not here & borrowed
    assert "_name_or_path" not in "".join(path.read_text() for path in FOLDER.rglob("*.json"))


def test_position_table_covers_the_largest_size(pipeline):
    config = pipeline.transformer.config
    assert 16 * config.pos_embed_max_size >= read_preset(FOLDER)["max_size"]
    assert config.num_attention_heads * config.attention_head_dim == config.caption_projection_dim


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["a red circle above a blue star", ""])
def test_text_is_read_as_diffusers_reads_it(pipeline, prompt):
    padded = {"padding": "max_length", "return_tensors": "pt"}
    clip_ids = pipeline.tokenizer(prompt, **padded).input_ids
    t5_ids = pipeline.tokenizer_3(prompt, max_length=64, **padded).input_ids
    rows, pooled = encode(pipeline, clip_ids, t5_ids)
    expected = pipeline.encode_prompt(prompt, prompt, prompt, do_classifier_free_guidance=False, max_sequence_length=64)
    torch.testing.assert_close(rows, expected[0])
    torch.testing.assert_close(pooled, expected[2])
    assert rows.shape == (1, 77 + 64, 128)


def test_it_draws_with_diffusers(pipeline):
    preset = read_preset(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    call = {"width": 128, "height": 128, "num_inference_steps": 2, "guidance_scale": preset["guidance"]}
    seed = torch.Generator().manual_seed(0)
    picture = pipeline("a red circle", negative_prompt="blue", max_sequence_length=64, generator=seed, **call).images[0]
    assert picture.size == (128, 128)
