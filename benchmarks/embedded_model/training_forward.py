"""Leaner forward passes than diffusers' for training: the same functions of the same parameters. What they share.

diffusers' modules under autocast spend most of a step in element-wise kernels. Here each block is one plain function in
bfloat16 with fused QKV, normalisation in float32, and small enough for `torch.compile` at fixed shapes. A shape that
was not asked to be compiled runs the same functions eagerly.

Shapes: B pictures, T text tokens, N image tokens, L = T + N, C hidden size, H heads, D head dimension.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6
Rope = tuple[Tensor, Tensor]


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x [B, L, C]) · (1 + scale [B, C]) + shift [B, C]."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=EPS)
    return (normed * (1 + scale[:, None].float()) + shift[:, None].float()).to(x.dtype)


def norm_rope(x: Tensor, weight: Tensor, rope: Rope | None) -> Tensor:
    """RMSNorm over D and, with a rope, rotary embedding of pairs; x [B, L, H, D], rope cos and sin [L, 1, D / 2]."""
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + EPS) * weight.float()
    if rope is None:
        return x32.to(x.dtype)
    even, odd = x32.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(x.dtype)


def projections(x: Tensor, layers: Sequence[nn.Linear], num_heads: int) -> Sequence[Tensor]:
    """Every layer's [B, L, H, D] by one matrix product."""
    weight = torch.cat([layer.weight for layer in layers]).to(x.dtype)
    bias = torch.cat([layer.bias for layer in layers]).to(x.dtype)
    return F.linear(x, weight, bias).unflatten(-1, (len(layers), num_heads, -1)).unbind(2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def feed_forward(x: Tensor, module: nn.Module) -> Tensor:
    return linear(F.gelu(linear(x, module.net[0].proj), approximate="tanh"), module.net[2])


def halves(x: Tensor, attended: Tensor, vectors: Sequence[Tensor], out: nn.Linear, mlp: nn.Module) -> Tensor:
    """x with both halves of a block added, attention's and the MLP's; `vectors`: adaLN-Zero's six, [B, C] each."""
    x = x + vectors[2][:, None] * linear(attended, out)
    return x + vectors[5][:, None] * feed_forward(modulate(x, vectors[3], vectors[4]), mlp)


def double_block(
    block: nn.Module, text: Tensor, image: Tensor, conditioning: Tensor, rope: Rope | None
) -> tuple[Tensor, Tensor]:
    """A joint block of two streams, FLUX's or SD3's; `conditioning` is silu of the time and text embedding, [B, C]."""
    attn, heads, num_text = block.attn, block.attn.heads, text.shape[1]
    t = linear(conditioning, block.norm1_context.linear).chunk(6, -1)
    i = linear(conditioning, block.norm1.linear).chunk(6, -1)
    tq, tk, tv = projections(modulate(text, t[0], t[1]), (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), heads)
    iq, ik, iv = projections(modulate(image, i[0], i[1]), (attn.to_q, attn.to_k, attn.to_v), heads)
    text_rope, image_rope = rope and tuple(x[:num_text] for x in rope), rope and tuple(x[num_text:] for x in rope)
    q = [norm_rope(tq, attn.norm_added_q.weight, text_rope), norm_rope(iq, attn.norm_q.weight, image_rope)]
    k = [norm_rope(tk, attn.norm_added_k.weight, text_rope), norm_rope(ik, attn.norm_k.weight, image_rope)]
    attended = attention(torch.cat(q, 1), torch.cat(k, 1), torch.cat([tv, iv], 1))
    text = halves(text, attended[:, :num_text], t, attn.to_add_out, block.ff_context)
    image = halves(image, attended[:, num_text:], i, attn.to_out[0], block.ff)
    return text, image


class Inputs(NamedTuple):
    """Of the transformer, for a batch of pictures of one size."""

    noisy: Tensor
    """[B, N, 4 * channels]: FluxPipeline's order within a token"""
    sigma: Tensor
    """Noise levels [B], 0..1."""
    text: Tensor
    """[B, T, text_dim]"""
    pooled: Tensor
    """[B, pooled_dim]"""
    size: tuple[int, int]
    """Width and height, pixels."""
    reference: Tensor | None = None
    """[B, N, 4 * channels]: latents of a picture of the same size that is attended to; FLUX's alone."""


class TrainingForward:
    """Velocity of a batch. `dtype` is that of activations; parameters stay what they are (float32)."""

    BLOCKS: ClassVar[tuple[Callable, ...]]
    """The functions that are compiled."""

    def __init__(self, transformer: nn.Module, dtype: torch.dtype) -> None:
        self._transformer = transformer
        self._dtype = dtype
        self._compiled: dict[tuple[int, int, int], tuple[Callable, ...]] = {}

    def of(self, transformer: nn.Module) -> Self:
        """The same for another transformer of the same shape, with what is compiled already."""
        other = type(self)(transformer, self._dtype)
        other._compiled = self._compiled
        return other

    def compile_for(self, batch: int, num_text: int, num_image: int) -> None:
        """Compile the blocks for batches of exactly this shape, at their first use.

        `num_image`: with the reference's.
        """
        self._compiled[batch, num_text, num_image] = tuple(torch.compile(b, dynamic=False) for b in self.BLOCKS)

    def compile_nothing(self) -> None:
        self._compiled.clear()

    def __call__(self, inputs: Inputs) -> Tensor:
        """The velocity [B, N, 4 * channels], float32, in the order of `Inputs.noisy`."""
        raise NotImplementedError

    def _blocks_for(self, inputs: Inputs) -> tuple[Callable, ...]:
        num_image = inputs.noisy.shape[1] * (1 if inputs.reference is None else 2)
        shape = len(inputs.noisy), inputs.text.shape[1], num_image
        return self._compiled.get(shape, self.BLOCKS)

    def _conditioning(self, inputs: Inputs) -> Tensor:
        """silu of the time and text embedding, [B, C]."""
        embedded = self._transformer.time_text_embed(inputs.sigma.float() * 1000, inputs.pooled.float())
        return F.silu(embedded).to(self._dtype)

    def _head(self, tokens: Tensor, conditioning: Tensor) -> Tensor:
        """The velocity of image tokens, as the output layer orders it."""
        scale, shift = linear(conditioning, self._transformer.norm_out.linear).chunk(2, -1)
        return linear(modulate(tokens, shift, scale), self._transformer.proj_out).float()
