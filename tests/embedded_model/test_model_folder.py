"""The shipped folder: size limits, architecture, preset, and that it loads in float32 with nothing said."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from benchmarks.embedded_model.export import MAX_FOLDER_BYTES, check_sizes

FOLDER = Path(__file__).parents[2] / "configs/models/shapes"


def test_sizes():
    assert check_sizes(FOLDER) <= MAX_FOLDER_BYTES


def test_oversized_shard_is_refused(tmp_path):
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.truncate(15 * 2**20 + 1)
    with pytest.raises(ValueError, match="limit 15728640"):
        check_sizes(tmp_path)


def test_transformer_heads_divide_by_two_three_and_four():
    config = json.loads((FOLDER / "transformer/config.json").read_text())
    assert config["num_attention_heads"] % 12 == 0
    assert sum(config["axes_dims_rope"]) == config["attention_head_dim"] == 32
    assert config["guidance_embeds"] is False


def test_configurations_name_no_folder_of_the_machine_that_trained():
    for path in FOLDER.rglob("*.json"):
        assert "_name_or_path" not in path.read_text(), path


def test_preset_is_within_the_issue():
    preset = json.loads((FOLDER / "preset.json").read_text())
    assert preset["num_steps"] <= 16
    assert (preset["min_size"], preset["max_size"]) == (128, 512)


def test_text_encoders_load_in_float32_and_read_odd_words():
    t5, clip = (
        T5EncoderModel.from_pretrained(FOLDER / "text_encoder_2"),
        CLIPTextModel.from_pretrained(FOLDER / "text_encoder"),
    )
    assert t5.dtype == clip.dtype == torch.float32
    text = "a flurbish ☂ circle"
    t5_ids = T5TokenizerFast.from_pretrained(FOLDER / "tokenizer_2")(text, return_tensors="pt").input_ids
    clip_ids = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")(text, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.isfinite(t5(t5_ids).last_hidden_state).all()
        assert torch.isfinite(clip(clip_ids).pooler_output).all()
