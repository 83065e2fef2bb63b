"""Text as steps read it: the encoders' outputs equal the libraries', the projection is part of encoding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor
from torch.nn import functional

from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.models.encoders import ClipEncoder, T5Encoder, one_thread
from tetrion.engine.models.loading import component_tensors, load_to_device
from tetrion.engine.models.registry import components_of

PROMPT = "a red circle above a blue square"


@pytest.mark.parametrize("prompt", [PROMPT, "?", "zebra " * 100])
def test_fields_are_diffusers_embeddings_bit_for_bit_and_projected(make_checkpoint, load, prompt) -> None:
    path = make_checkpoint()
    loaded = load(path)
    fields, num_tokens = loaded.embed(prompt), loaded.model.text.tokens(prompt).num_tokens
    theirs = FluxPipeline.from_pretrained(path, local_files_only=True)
    embeds, pooled, _ = theirs.encode_prompt(prompt, max_sequence_length=32)
    assert torch.equal(fields["pooled"], pooled)
    torch.testing.assert_close(fields["text"], theirs.transformer.context_embedder(embeds[0]), rtol=1e-6, atol=1e-6)
    assert fields["text"].shape == (32, loaded.network.hidden_size)
    assert (num_tokens > 32) == (len(prompt) > 100)


def test_all_layers_get_one_position_bias_that_fused_attention_takes(
    make_checkpoint: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask whose last dimension is strided sends attention to whole matrices in fp32; a copy a layer costs too."""
    spec = read_model_spec(make_checkpoint())
    path = Path(spec.path)
    tensors = load_to_device(components_of(spec, "dummy"), torch.device("cpu"), torch.float32)
    own = component_tensors(tensors, "text_encoder_2")
    encoder = T5Encoder(path / "text_encoder_2", path / "tokenizer_2", own, "dummy", spec.max_text_tokens)
    masks: list[Tensor] = []
    attention = functional.scaled_dot_product_attention

    def watched(*given: Tensor, attn_mask: Tensor | None = None, **named: Any) -> Tensor:
        if attn_mask is not None:
            masks.append(attn_mask)
        return attention(*given, attn_mask=attn_mask, **named)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched)
    encoder.rows(encoder.ids("a red circle"))
    assert len(masks) > 1 and masks[0].stride(-1) == 1 and masks[0].shape[-1] == spec.max_text_tokens
    assert {mask.data_ptr() for mask in masks} == {masks[0].data_ptr()}


def test_ids_have_one_shape_for_all_prompts(make_checkpoint, load) -> None:
    text = load(make_checkpoint()).model.text
    shapes = {tuple(ids.shape for ids in text.tokens(prompt).ids) for prompt in (PROMPT, "", "zebra " * 100)}
    assert shapes == {((1, 77), (1, 32))}


def test_clip_reads_77_tokens_whatever_the_models_text_length(make_checkpoint) -> None:
    spec = read_model_spec(make_checkpoint())
    path = Path(spec.path)
    tensors = load_to_device(components_of(spec, "dummy"), torch.device("cpu"), torch.float32)
    clip = ClipEncoder(path / "text_encoder", path / "tokenizer", component_tensors(tensors, "text_encoder"))
    assert clip.ids(PROMPT).shape == (1, 77) and clip.pooled(clip.ids(PROMPT)).shape == (20,)


def test_one_thread_is_for_as_long_as_it_lasts() -> None:
    torch.set_num_threads(2)
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
