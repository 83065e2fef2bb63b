"""FluxTransformer2DModel's forward pass for training; `training_forward.py` says why and what the letters mean."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.embedded_model.training_forward import (
    Inputs,
    Rope,
    TrainingForward,
    attention,
    double_block,
    linear,
    modulate,
    norm_rope,
    projections,
)


def single_block(block: nn.Module, tokens: Tensor, conditioning: Tensor, rope: Rope) -> Tensor:
    """One single-stream block on [B, L, C]."""
    attn = block.attn
    shift, scale, gate = linear(conditioning, block.norm.linear).chunk(3, -1)
    normed = modulate(tokens, shift, scale)
    q, k, v = projections(normed, (attn.to_q, attn.to_k, attn.to_v), attn.heads)
    attended = attention(norm_rope(q, attn.norm_q.weight, rope), norm_rope(k, attn.norm_k.weight, rope), v)
    mlp = F.gelu(linear(normed, block.proj_mlp), approximate="tanh")
    return tokens + gate[:, None] * linear(torch.cat([attended, mlp], -1), block.proj_out)


def image_position_ids(width: int, height: int, device, index: int = 0) -> Tensor:
    """Rotary position ids (height/16 * width/16, 3): index (1 for a reference), row, column."""
    rows, columns = torch.meshgrid(torch.arange(height // 16), torch.arange(width // 16), indexing="ij")
    return torch.stack([torch.full_like(rows, index), rows, columns], -1).view(-1, 3).float().to(device)


class FluxForward(TrainingForward):
    """Of a FluxTransformer2DModel without guidance input; with references as FLUX.1 Kontext has them."""

    BLOCKS = (double_block, single_block)

    def __init__(self, transformer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(transformer, dtype)
        self._ropes: dict[tuple[int, int, int, bool], Rope] = {}

    def __call__(self, inputs: Inputs) -> Tensor:
        return self._velocities(inputs, [0])[0]

    def guided(self, inputs: Inputs, scale: float) -> Tensor:
        """The velocity led away from a worse model's, which is this one without its first single block.

        scale 1 is no guidance. Autoguidance (arXiv:2406.02507) with a skipped layer for the worse model, as Stable
        Diffusion 3.5 Medium does at inference.
        """
        full, worse = self._velocities(inputs, [0, 1])
        return worse + scale * (full - worse)

    def _velocities(self, inputs: Inputs, num_skipped: Sequence[int]) -> list[Tensor]:
        """The velocity for every number of first single blocks left out."""
        model, num_text = self._transformer, inputs.text.shape[1]
        double, single = self._blocks_for(inputs)
        num_image, has_reference = inputs.noisy.shape[1], inputs.reference is not None
        rope = self._rope(inputs.size, num_text, has_reference, inputs.noisy.device)
        conditioning = self._conditioning(inputs)
        pictures = inputs.noisy if inputs.reference is None else torch.cat([inputs.noisy, inputs.reference], 1)
        image = linear(pictures.to(self._dtype), model.x_embedder)
        words = linear(inputs.text.to(self._dtype), model.context_embedder)
        for block in model.transformer_blocks:
            words, image = double(block, words, image, conditioning, rope)
        velocities = []
        for first in num_skipped:
            tokens = torch.cat([words, image], 1)
            for block in list(model.single_transformer_blocks)[first:]:
                tokens = single(block, tokens, conditioning, rope)
            velocities.append(self._head(tokens[:, num_text : num_text + num_image], conditioning))
        return velocities

    def _rope(self, size: tuple[int, int], num_text: int, has_reference: bool, device: torch.device) -> Rope:
        place = (*size, num_text, has_reference)
        if place not in self._ropes:
            grids = [image_position_ids(*size, device, index) for index in range(1 + has_reference)]
            cos, sin = self._transformer.pos_embed(torch.cat([torch.zeros(num_text, 3, device=device), *grids]))
            self._ropes[place] = (cos[:, None, ::2].float().contiguous(), sin[:, None, ::2].float().contiguous())
        return self._ropes[place]
