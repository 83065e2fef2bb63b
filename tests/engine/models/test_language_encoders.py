"""Hidden states of a language model's layers are the library's, whatever else the checkpoint holds."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM, Qwen3Model, Qwen3VLForConditionalGeneration

from tests.engine.families.pipelines import QWEN_WIDTH, qwen3_config, qwen3_vl_config, qwen_tokenizer
from tetrion.engine.families import zimage
from tetrion.engine.families.prompts import PromptReader
from tetrion.engine.model_spec import CheckpointError
from tetrion.engine.models.language_encoders import QWEN3, QWEN3_VL, LanguageEncoder, LanguageKind, language_component
from tetrion.engine.models.loading import ComponentFiles, component_tensors, load_to_device

NUM_LAYERS, LENGTH = 4, 64
LAYERS = (1, 3)
PROMPT = "two cats"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    qwen_tokenizer().save_pretrained(path)
    return path


def encoder_of(folder: Path, tokenizer: Path, kind: LanguageKind = QWEN3) -> LanguageEncoder:
    component = language_component(kind, folder, ComponentFiles(folder), max(LAYERS))
    loaded = load_to_device({"it": component}, torch.device("cpu"), torch.float32)
    assert not any("layers.3." in name for name in loaded), "layers that are not run"
    reader = PromptReader(tokenizer, zimage.CHAT, 300, LENGTH)
    return LanguageEncoder(kind, folder, component_tensors(loaded, "it"), LAYERS, reader)


def hidden_states(model: Qwen3Model | Qwen3ForCausalLM, ids: Tensor, mask: Tensor) -> Tensor:
    states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    return torch.cat([states[layer][0] for layer in LAYERS], dim=-1)


@pytest.mark.parametrize("kind", [Qwen3Model, Qwen3ForCausalLM])
@torch.no_grad()
def test_rows_are_the_librarys_those_of_padding_too(
    kind: type[Qwen3Model] | type[Qwen3ForCausalLM], tokenizer: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = kind(qwen3_config(NUM_LAYERS)).eval()
    model.save_pretrained(tmp_path)
    encoder = encoder_of(tmp_path, tokenizer)
    ids, is_own, num_tokens = encoder.ids(PROMPT)
    text = zimage.CHAT.of(PROMPT).replace("<|im_start|>", "s").replace("<|im_end|>", "e")
    assert ids.shape == (1, LENGTH) and int(is_own.sum()) == num_tokens == len(text)
    rows, expected = encoder.rows(ids, is_own), hidden_states(model, ids, is_own.long())
    assert rows.shape == (LENGTH, len(LAYERS) * QWEN_WIDTH)
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_model_that_sees_pictures_reads_text_as_the_library_does(tokenizer: Path, tmp_path: Path) -> None:
    """Its three positions are one for text."""
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(qwen3_vl_config(NUM_LAYERS)).eval()
    model.save_pretrained(tmp_path)
    encoder = encoder_of(tmp_path, tokenizer, QWEN3_VL)
    ids, is_own, num_tokens = encoder.ids(PROMPT)
    own = ids[:, :num_tokens]
    states = model(input_ids=own, mm_token_type_ids=torch.zeros_like(own), output_hidden_states=True).hidden_states
    expected = torch.cat([states[layer][0] for layer in LAYERS], dim=-1)
    torch.testing.assert_close(encoder.rows(ids, is_own)[:num_tokens], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_prompts_own_rows_do_not_depend_on_the_padding(tokenizer: Path, tmp_path: Path) -> None:
    Qwen3Model(qwen3_config(NUM_LAYERS)).save_pretrained(tmp_path)
    encoder = encoder_of(tmp_path, tokenizer)
    ids, is_own, _ = encoder.ids(PROMPT)
    other = torch.where(is_own, ids, 7)
    assert torch.equal(encoder.rows(ids, is_own)[is_own[0]], encoder.rows(other, is_own)[is_own[0]])


def test_a_checkpoint_without_a_layer_that_is_run_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    Qwen3Model(qwen3_config(2)).save_pretrained(tmp_path)
    qwen3_config(NUM_LAYERS).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no tensor layers\.2\."):
        encoder_of(tmp_path, tokenizer)
