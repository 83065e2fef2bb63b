"""The transformer's operators in plain PyTorch: the oracle for every GPU kernel and the CPU path itself.

Owns nothing and must know nothing of models, groups or requests. Shapes: L tokens of the whole sequence, n tokens of
this call, H heads (h: the heads of this call), D head dimension.

**Row exactness.** A token's result must not depend, bit for bit, on which other rows are in the call, nor on the number
of threads. Measured with MKL on x86-64 (fp32): a GEMM keeps that promise from 12 rows on, so `linear` pads below 16; on
Intel's processors only where the environment asks for it (`engine/executors/fleet/reproducible.py`).
ATen's vectorised loops end in a scalar tail, which rounds differently for tanh, sigmoid, GELU and SiLU, and where a
thread's share ends depends on its size; `exp` has no such tail, so the activations here are built on it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6
MIN_EXACT_ROWS = 16
LEAST_NORM = 1e-30
"""Shorter rows are not made longer."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x [n, in] @ weight [out, in].T + bias [out]` -> [n, out], row-exact."""
    num_rows = x.shape[0]
    if num_rows >= MIN_EXACT_ROWS:
        return F.linear(x, weight, bias)
    return F.linear(F.pad(x, (0, 0, 0, MIN_EXACT_ROWS - num_rows)), weight, bias)[:num_rows]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v without a mask; q, k, v and the result are [L, h, D]. Exact per head. k and v may have
    fewer heads than q, each of which as many consecutive ones of q share."""
    if (heads_per_key := q.shape[1] // k.shape[1]) > 1:
        k, v = (x.repeat_interleave(heads_per_key, dim=1) for x in (k, v))
    q_1hLD, k_1hLD, v_1hLD = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return F.scaled_dot_product_attention(q_1hLD, k_1hLD, v_1hLD).squeeze(0).transpose(0, 1)


def qk_norm_rope(
    qkv: Tensor | Sequence[Tensor],
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    epsilon: float = EPS,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of q and k over D, then the rotary embedding: pairs (2i, 2i+1) turn by one angle. Either may be left out.

    qkv: [n, 3, H, D], or q, k, v apart, [n, heads, D] each; q_norm, k_norm: [D]; rope: cos, sin, [n, D] each, with each
        value twice (diffusers' layout).
    Returns q, k, v, each [n, heads, D]; v is a view of qkv.
    """
    q, k, v = qkv.unbind(1) if isinstance(qkv, Tensor) else qkv
    q, k = (
        x if weight is None else F.rms_norm(x, weight.shape, weight, epsilon)
        for x, weight in ((q, q_norm), (k, k_norm))
    )
    return (q, k, v) if rope is None else (_turned(q, rope), _turned(k, rope), v)


def _turned(x_nHD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos_n1D, sin_n1D = (table.unsqueeze(1) for table in rope)
    pairs_nHd = torch.view_as_complex(x_nHD.unflatten(-1, (-1, 2)))
    # i · (a + bi) = −b + ai, exactly; a complex product with cos + i sin would round differently in loop tails.
    turned_nHD = torch.view_as_real(pairs_nHd * 1j).flatten(-2)
    return (x_nHD * cos_n1D).add_(turned_nHD.mul_(sin_n1D))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x [n, C]) without affine weights, times (1 + scale [C]), plus shift [C]."""
    return F.layer_norm(x, x.shape[-1:], 1 + scale, shift, EPS)


def gated_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x [n, C] + gate [C] · y [n, C]."""
    return torch.addcmul(x, gate, y)


def rms_norm(x: Tensor, epsilon: float, weight: Tensor | None = None) -> Tensor:
    """RMSNorm of x [n, C] over C (arXiv:1910.07467), with or without weights [C]."""
    return F.rms_norm(x, x.shape[-1:], weight, epsilon)


class Branch(NamedTuple):
    """A stream between two sub-blocks: x + gate · y, which is to be normed, scaled and shifted. x, y: [n, C]; vectors:
    [C]. Without y there is nothing to add. For the kernel that knows its step, vectors are tables [steps, C]."""

    x: Tensor
    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None
    y: Tensor | None = None


def residual_modulate(branches: Sequence[Branch], rms_epsilon: float | None = None) -> list[tuple[Tensor, Tensor]]:
    """(the sum, that modulated) of each branch; with `rms_epsilon` by RMSNorm in place of LayerNorm."""
    pairs = []
    for x, shift, scale, gate, y in branches:
        total = x if gate is None or y is None else gated_residual(x, gate, y)
        if rms_epsilon is None:
            pairs.append((total, modulate(total, shift, scale)))
        else:
            pairs.append((total, torch.addcmul(shift, rms_norm(total, rms_epsilon), 1 + scale)))
    return pairs


def guided_step(state: Tensor, velocities: Sequence[Tensor], coefficients: Tensor, guidance: float) -> Tensor:
    """A linear solver's step: each new row of the state is a sum over the old ones and the velocity, in this order.

    state: fp32 [n, K·C], K rows of C side by side. velocities: [n, C] each, of the prompt and, with guidance, of the
    negative prompt: v₁ + guidance · (v₀ − v₁). coefficients: fp32 [K, K + 1], the velocity's last. All in fp32.
    """
    velocity = velocities[0].float()
    if len(velocities) == 2:
        negative = velocities[1].float()
        velocity = negative + guidance * (velocity - negative)
    old = state.unflatten(1, (len(coefficients), -1))
    rows = []
    for weights in coefficients.tolist():
        total = weights[0] * old[:, 0]
        for weight, row in zip(weights[1:-1], old.unbind(1)[1:], strict=True):
            total = total + weight * row
        rows.append(total + weights[-1] * velocity)
    return torch.cat(rows, dim=1)


def rescaled_guidance(velocity: Tensor, negative: Tensor, guidance: float) -> Tensor:
    """v₁ + guidance · (v₀ − v₁), each row as long as v₀'s: fp32 [n, C], of the prompt's and the negative prompt's."""
    own, other = velocity.float(), negative.float()
    mixed = other + guidance * (own - other)
    own_N1, mixed_N1 = (x.square().sum(1, keepdim=True).sqrt_() for x in (own, mixed))
    return mixed * (own_N1 / mixed_N1.clamp_min(LEAST_NORM))


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh approximation (arXiv:1606.08415): ½x(1 + tanh u) = x / (1 + exp(−2u)), u = √(2/π)(x + 0.044715x³)."""
    twice = 2 * math.sqrt(2 / math.pi)
    exponent = x.square().mul_(-0.044715 * twice).sub_(twice).mul_(x)
    denominator = exponent.exp_().add_(1)
    return torch.div(x, denominator, out=denominator)


def silu_product(x: Tensor) -> Tensor:
    """[n, 2·F] -> [n, F]: SiLU of the first half of channels, times the second (SwiGLU, arXiv:2002.05202)."""
    gate, value = x.chunk(2, dim=-1)
    return silu(gate.contiguous()).mul_(value)


def sigmoid_product(x: Tensor, gate: Tensor) -> Tensor:
    """x · sigmoid(gate) = x / (1 + exp(−gate)); [n, C] both. A new tensor."""
    denominator = gate.contiguous().neg().exp_().add_(1)
    return torch.div(x, denominator, out=denominator)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, epsilon: float) -> Tensor:
    """SiLU of x [P, C] normed over all P pixels and the channels of each group, then scaled and shifted."""
    return silu(F.group_norm(x.T.unsqueeze(0), num_groups, weight, bias, epsilon)[0].T)


def silu(x: Tensor) -> Tensor:
    """x · sigmoid(x) = x / (1 + exp(−x))."""
    denominator = x.neg().exp_().add_(1)
    return torch.div(x, denominator, out=denominator)
