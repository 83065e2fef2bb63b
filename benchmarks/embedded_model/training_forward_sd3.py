"""SD3Transformer2DModel's forward pass for training; `training_forward.py` says why and what the letters mean."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.embedded_model.training_forward import (
    Inputs,
    TrainingForward,
    attention,
    double_block,
    halves,
    linear,
    modulate,
    norm_rope,
    projections,
)


def last_block(block: nn.Module, text: Tensor, image: Tensor, conditioning: Tensor) -> Tensor:
    """The joint block that ends the model: text gives keys and values only. Returns the image's stream."""
    attn, heads = block.attn, block.attn.heads
    scale, shift = linear(conditioning, block.norm1_context.linear).chunk(2, -1)
    i = linear(conditioning, block.norm1.linear).chunk(6, -1)
    tk, tv = projections(modulate(text, shift, scale), (attn.add_k_proj, attn.add_v_proj), heads)
    iq, ik, iv = projections(modulate(image, i[0], i[1]), (attn.to_q, attn.to_k, attn.to_v), heads)
    k = [norm_rope(tk, attn.norm_added_k.weight, None), norm_rope(ik, attn.norm_k.weight, None)]
    attended = attention(norm_rope(iq, attn.norm_q.weight, None), torch.cat(k, 1), torch.cat([tv, iv], 1))
    return halves(image, attended, i, attn.to_out[0], block.ff)


class SD3Forward(TrainingForward):
    """Of an SD3Transformer2DModel with RMS norms of queries and keys and without dual attention."""

    BLOCKS = (double_block, last_block)

    def __call__(self, inputs: Inputs) -> Tensor:
        model = self._transformer
        double, last = self._blocks_for(inputs)
        conditioning = self._conditioning(inputs)
        patches, (width, height) = model.pos_embed.proj, inputs.size
        image = F.linear(
            inputs.noisy.to(self._dtype), patches.weight.flatten(1).to(self._dtype), patches.bias.to(self._dtype)
        )
        image = image + model.pos_embed.cropped_pos_embed(height // 8, width // 8).to(self._dtype)
        words = linear(inputs.text.to(self._dtype), model.context_embedder)
        for block in model.transformer_blocks[:-1]:
            words, image = double(block, words, image, conditioning, None)
        image = last(model.transformer_blocks[-1], words, image, conditioning)
        velocity = self._head(image, conditioning)  # within a token: row, column, channel
        return velocity.unflatten(-1, (4, -1)).transpose(-1, -2).flatten(-2)
