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


def timestep_embedding(values: Tensor) -> Tensor:
    """Sinusoidal embedding [S] -> [S, 256], cosines first (arXiv:2006.11239, as FLUX and SD3 use it)."""
    half = TIME_CHANNELS // 2
    exponents = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values.float().unsqueeze(1) * torch.exp(exponents).unsqueeze(0)
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
