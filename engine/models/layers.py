"""What families' networks are written with: weights by name, embeddings, sums between sub-blocks.

Owns no architecture. Shapes: n rows, C hidden size.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tetrion.engine.families.plan import TIME_CHANNELS
from tetrion.engine.models.ops import Linear, Ops
from tetrion.kernels.reference import Branch


def linear_of(tensors: Mapping[str, Tensor], name: str) -> Linear:
    return Linear(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


@dataclass(frozen=True, slots=True)
class Embedder:
    """Two linear layers with SiLU between."""

    in_layer: Linear
    out_layer: Linear

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], name: str) -> "Embedder":
        return cls(linear_of(tensors, f"{name}.in_layer"), linear_of(tensors, f"{name}.out_layer"))

    def __call__(self, ops: Ops, x: Tensor) -> Tensor:
        return ops.linear(ops.silu(ops.linear(x, self.in_layer)), self.out_layer)


@dataclass(frozen=True, slots=True)
class StreamBlock:
    """One stream (text or image) of a FLUX double block, or a block of Qwen-Image-2.1. `qkv`: [3·C, C]."""

    qkv: Linear
    q_norm: Tensor
    k_norm: Tensor
    out: Linear
    mlp_in: Linear
    mlp_out: Linear

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], name: str) -> "StreamBlock":
        qkv, out, mlp_in, mlp_out = (linear_of(tensors, f"{name}.{n}") for n in ("qkv", "out", "mlp_in", "mlp_out"))
        return cls(qkv, tensors[f"{name}.q_norm"], tensors[f"{name}.k_norm"], out, mlp_in, mlp_out)


@dataclass(frozen=True, slots=True)
class SingleBlock:
    """A FLUX single block. `out` takes attention and the MLP's inner rows side by side: [C, C + inner]."""

    qkv: Linear
    q_norm: Tensor
    k_norm: Tensor
    mlp_in: Linear
    out: Linear

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], name: str) -> "SingleBlock":
        qkv, mlp_in, out = (linear_of(tensors, f"{name}.{n}") for n in ("qkv", "mlp_in", "out"))
        return cls(qkv, tensors[f"{name}.q_norm"], tensors[f"{name}.k_norm"], mlp_in, out)


def time_conditioning(
    ops: Ops, time_in: Embedder, guidance_in: Embedder | None, timesteps: Tensor, guidance: float, dtype: torch.dtype
) -> Tensor:
    """Embeddings of the steps' times, and of the guidance where a FLUX model takes it: [S, C].

    timesteps: [S] fp32, as the scheduler gives them (0 … 1000).
    """
    # Pipelines divide by 1000 and the transformers multiply again, which is not the identity in fp32.
    conditioning = time_in(ops, timestep_embedding(timesteps / 1000 * 1000).to(dtype))
    if guidance_in is not None:
        guidance_1 = torch.full((1,), guidance, dtype=torch.float32, device=timesteps.device) * 1000
        conditioning = conditioning + guidance_in(ops, timestep_embedding(guidance_1).to(dtype))
    return conditioning


def timestep_embedding(values: Tensor, scale: float = 1.0) -> Tensor:
    """Sinusoidal embedding [S] -> [S, 256], cosines first (arXiv:2006.11239, as FLUX and SD3 use it). `scale`: of the
    angles."""
    half = TIME_CHANNELS // 2
    exponents = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = scale * (values.float().unsqueeze(1) * torch.exp(exponents).unsqueeze(0))
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def rotary_angles(positions: Tensor, axes_dims: Sequence[int], theta: float) -> Tensor:
    """Angles fp64 [n, head_dim / 2] by which pairs of channels turn (arXiv:2104.09864), those of an axis side by side;
    positions: [n, axes]."""
    return torch.cat(
        [
            torch.outer(positions[:, i].double(), 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim))
            for i, dim in enumerate(axes_dims)
        ],
        dim=1,
    )


class Sum(NamedTuple):
    """A stream's hidden states between two sub-blocks, x + gate · y: the next one adds, in one pass with its norm."""

    x: Tensor
    gate: Tensor | None = None
    y: Tensor | None = None

    def branch(self, shift: Tensor, scale: Tensor) -> Branch:
        return Branch(self.x, shift, scale, self.gate, self.y)

    def rows(self, first: int, last: int) -> "Sum":
        """From the first to the one before the last."""
        return Sum(self.x[first:last], self.gate, None if self.y is None else self.y[first:last])


def normed(
    ops: Ops, streams: Sequence[Sum], shifts_scales: Sequence[tuple[Tensor, Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Each stream's sum, and that modulated."""
    pairs = ops.residual_modulate([s.branch(*vectors) for s, vectors in zip(streams, shifts_scales, strict=True)])
    return [x for x, _ in pairs], [modulated for _, modulated in pairs]


def take(vectors: Iterator[Tensor], count: int) -> tuple[Tensor, ...]:
    """The next of a step's vectors."""
    return tuple(itertools.islice(vectors, count))
