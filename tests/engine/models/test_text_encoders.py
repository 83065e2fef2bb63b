"""T5's position bias as fused attention takes it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.models.loading import component_tensors, load_to_device
from tetrion.engine.models.registry import model_components
from tetrion.engine.models.text_encoders import TextEncoders

ENCODERS = ("text_encoder", "text_encoder_2")


def test_all_layers_get_one_position_bias_that_fused_attention_takes(
    make_checkpoint: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask whose last dimension is strided sends attention to whole matrices in fp32; a copy a layer costs too."""
    spec = read_model_spec(make_checkpoint())
    tensors = load_to_device(model_components(spec, "dummy"), torch.device("cpu"), torch.float32)
    encoders = TextEncoders(*(component_tensors(tensors, name) for name in ENCODERS), spec, "dummy")
    masks: list[Tensor] = []
    attention = functional.scaled_dot_product_attention

    def watched(*given: Tensor, attn_mask: Tensor | None = None, **named: Any) -> Tensor:
        if attn_mask is not None and attn_mask.shape[1] > 1:  # CLIP's mask is the same for all heads
            masks.append(attn_mask)
        return attention(*given, attn_mask=attn_mask, **named)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched)
    encoders.encode("a red circle")
    assert len(masks) > 1 and masks[0].stride(-1) == 1 and masks[0].shape[-1] == spec.max_text_tokens
    assert {mask.data_ptr() for mask in masks} == {masks[0].data_ptr()}
