"""A leaner forward pass of FluxTransformer2DModel for training: the same function of the same parameters.

diffusers' module under autocast spends most of a step in element-wise kernels. Here each block is one plain function in
bfloat16 with fused QKV, normalisation in float32, and small enough for `torch.compile` at fixed shapes. A shape that
was not asked to be compiled runs the same functions eagerly.

Shapes: B pictures, T text tokens, N image tokens, L = T + N, C hidden size, H heads, D head dimension.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

EPS = 1e-6
Rope = tuple[Tensor, Tensor]


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x [B, L, C]) · (1 + scale [B, C]) + shift [B, C]."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=EPS)
    return (normed * (1 + scale[:, None].float()) + shift[:, None].float()).to(x.dtype)


def norm_rope(x: Tensor, weight: Tensor, rope: Rope) -> Tensor:
    """RMSNorm over D and rotary embedding of pairs; x [B, L, H, D], rope cos and sin [L, 1, D / 2]."""
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + EPS) * weight.float()
    even, odd = x32.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(x.dtype)


def qkv(x: Tensor, layers: tuple[nn.Linear, nn.Linear, nn.Linear], num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, L, H, D] by one matrix product."""
    weight = torch.cat([layer.weight for layer in layers]).to(x.dtype)
    bias = torch.cat([layer.bias for layer in layers]).to(x.dtype)
    return F.linear(x, weight, bias).unflatten(-1, (3, num_heads, -1)).unbind(2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def double_block(
    block: nn.Module, text: Tensor, image: Tensor, conditioning: Tensor, rope: Rope
) -> tuple[Tensor, Tensor]:
    """One double-stream block; `conditioning` is silu of the time and text embedding, [B, C]."""
    attn, heads, num_text = block.attn, block.attn.heads, text.shape[1]
    t = linear(conditioning, block.norm1_context.linear).chunk(6, -1)
    i = linear(conditioning, block.norm1.linear).chunk(6, -1)
    tq, tk, tv = qkv(modulate(text, t[0], t[1]), (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), heads)
    iq, ik, iv = qkv(modulate(image, i[0], i[1]), (attn.to_q, attn.to_k, attn.to_v), heads)
    text_rope, image_rope = (tuple(x[:num_text] for x in rope), tuple(x[num_text:] for x in rope))
    q = torch.cat(
        [norm_rope(tq, attn.norm_added_q.weight, text_rope), norm_rope(iq, attn.norm_q.weight, image_rope)], 1
    )
    k = torch.cat(
        [norm_rope(tk, attn.norm_added_k.weight, text_rope), norm_rope(ik, attn.norm_k.weight, image_rope)], 1
    )
    attended = attention(q, k, torch.cat([tv, iv], 1))
    text = text + t[2][:, None] * linear(attended[:, :num_text], attn.to_add_out)
    image = image + i[2][:, None] * linear(attended[:, num_text:], attn.to_out[0])
    text = text + t[5][:, None] * feed_forward(modulate(text, t[3], t[4]), block.ff_context)
    image = image + i[5][:, None] * feed_forward(modulate(image, i[3], i[4]), block.ff)
    return text, image


def single_block(block: nn.Module, tokens: Tensor, conditioning: Tensor, rope: Rope) -> Tensor:
    """One single-stream block on [B, L, C]."""
    attn = block.attn
    shift, scale, gate = linear(conditioning, block.norm.linear).chunk(3, -1)
    normed = modulate(tokens, shift, scale)
    q, k, v = qkv(normed, (attn.to_q, attn.to_k, attn.to_v), attn.heads)
    attended = attention(norm_rope(q, attn.norm_q.weight, rope), norm_rope(k, attn.norm_k.weight, rope), v)
    mlp = F.gelu(linear(normed, block.proj_mlp), approximate="tanh")
    return tokens + gate[:, None] * linear(torch.cat([attended, mlp], -1), block.proj_out)


def feed_forward(x: Tensor, module: nn.Module) -> Tensor:
    return linear(F.gelu(linear(x, module.net[0].proj), approximate="tanh"), module.net[2])


class Inputs(NamedTuple):
    """Of the transformer, for a batch of pictures of one size."""

    noisy: Tensor
    """[B, N, in_channels]"""
    sigma: Tensor
    """Noise levels [B], 0..1."""
    text: Tensor
    """[B, T, text_dim]"""
    pooled: Tensor
    """[B, pooled_dim]"""
    image_ids: Tensor
    """[N, 3]"""
    size: tuple[int, int]
    """Width and height, pixels."""


class TrainingForward:
    """Velocity of a batch. `dtype` is that of activations; parameters stay what they are (float32)."""

    def __init__(self, transformer: FluxTransformer2DModel, dtype: torch.dtype) -> None:
        self._transformer = transformer
        self._dtype = dtype
        self._compiled: dict[tuple[int, int, int], tuple[Callable, Callable]] = {}
        self._ropes: dict[tuple[int, int, int], Rope] = {}

    def of(self, transformer: FluxTransformer2DModel) -> "TrainingForward":
        """The same for another transformer of the same shape, with what is compiled already."""
        other = TrainingForward(transformer, self._dtype)
        other._compiled, other._ropes = self._compiled, self._ropes
        return other

    def compile_for(self, batch: int, num_text: int, num_image: int) -> None:
        """Compile the blocks for batches of exactly this shape, at their first use."""
        functions = (torch.compile(double_block, dynamic=False), torch.compile(single_block, dynamic=False))
        self._compiled[batch, num_text, num_image] = functions

    def compile_nothing(self) -> None:
        self._compiled.clear()

    def __call__(self, inputs: Inputs) -> Tensor:
        """The velocity [B, N, in_channels], float32."""
        return self._velocities(inputs, [0])[0]

    def guided(self, inputs: Inputs, scale: float) -> Tensor:
        """The velocity led away from a worse model's, which is this one without its first single block.

        scale 1 is no guidance. Autoguidance (arXiv:2406.02507) with a skipped layer for the worse model, as Stable
        Diffusion 3.5 Medium does at inference.
        """
        full, worse = self._velocities(inputs, [0, 1])
        return worse + scale * (full - worse)

    def _velocities(self, inputs: Inputs, num_skipped: list[int]) -> list[Tensor]:
        """The velocity for every number of first single blocks left out."""
        noisy, sigma, text, pooled, image_ids, size = inputs
        model, num_text = self._transformer, text.shape[1]
        double, single = self._compiled.get((len(noisy), num_text, noisy.shape[1]), (double_block, single_block))
        rope = self._rope(size, num_text, image_ids)
        embedded = model.time_text_embed(sigma.float() * 1000, pooled.float())
        conditioning = F.silu(embedded).to(self._dtype)
        image = linear(noisy.to(self._dtype), model.x_embedder)
        words = linear(text.to(self._dtype), model.context_embedder)
        for block in model.transformer_blocks:
            words, image = double(block, words, image, conditioning, rope)
        scale, shift = linear(conditioning, model.norm_out.linear).chunk(2, -1)
        velocities = []
        for first in num_skipped:
            tokens = torch.cat([words, image], 1)
            for block in list(model.single_transformer_blocks)[first:]:
                tokens = single(block, tokens, conditioning, rope)
            velocities.append(linear(modulate(tokens[:, num_text:], shift, scale), model.proj_out).float())
        return velocities

    def _rope(self, size: tuple[int, int], num_text: int, image_ids: Tensor) -> Rope:
        place = (*size, num_text)
        if place not in self._ropes:
            ids = torch.cat([torch.zeros(num_text, 3, device=image_ids.device), image_ids])
            cos, sin = self._transformer.pos_embed(ids)
            self._ropes[place] = (cos[:, None, ::2].float().contiguous(), sin[:, None, ::2].float().contiguous())
        return self._ropes[place]
