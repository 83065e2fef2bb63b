"""The operators a transformer is written in, as an argument: the same forward pass runs on every kind of device.

Owns the protocol and its form in plain PyTorch, which is the CPU's; the GPU's is `gpu_ops.py`. Knows no
architecture. Every implementation is row-exact (see kernels/reference.py): a token's result does not depend on the
other rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tetrion.kernels import reference
from tetrion.kernels.reference import Branch


@dataclass(frozen=True, slots=True)
class Linear:
    """weight: [out, in]; bias: [out], or none."""

    weight: Tensor
    bias: Tensor | None = None


class Ops(Protocol):
    """x, y and results: [n, …] rows of tokens; C their width.

    Vectors (shift, scale, gate) are columns of a modulation table's last dimension, [S, C] of all steps: the
    implementation itself knows which step it is at.
    """

    def linear(self, x: Tensor, layer: Linear) -> Tensor:
        """[n, in] -> [n, out]."""

    def gelu_linear(self, x: Tensor, layer: Linear) -> Tensor:
        """`linear`, then GELU's tanh approximation."""

    def gated_linear(self, x: Tensor, layer: Linear) -> Tensor:
        """[n, in] -> [n, out / 2]: SiLU of `linear`'s first half of outputs, times its second (SwiGLU)."""

    def joined_linear(self, left: Tensor, right: Tensor, layer: Linear) -> Tensor:
        """The layer applied to [left | right]: [n, a] and [n, b] -> [n, out], with a weight of [out, a + b]."""

    def narrow_linear(self, x: Tensor, layer: Linear) -> Tensor:
        """`linear` for few output channels, where a GEMM library may split its sums by the number of rows."""

    def silu(self, x: Tensor) -> Tensor: ...

    def sigmoid_product(self, x: Tensor, gate: Tensor) -> Tensor:
        """x · sigmoid(gate), [n, C] both."""

    def residual_modulate(
        self, branches: Sequence[Branch], *, rms_epsilon: float | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """(x + gate · y, LayerNorm of that · (1 + scale) + shift) of one or two streams; with `rms_epsilon` RMSNorm. y
        may be overwritten."""

    def gated_sum(self, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        """x + gate · y, where no norm follows. y may be overwritten."""

    def residual_rms(
        self, x: Tensor, scale: Tensor, gate: Tensor | None = None, y: Tensor | None = None, *, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        """(x + gate · RMSNorm(y), RMSNorm of that · scale), norms without weights. y may be overwritten."""

    def gated_rms_sum(self, x: Tensor, gate: Tensor, y: Tensor, *, epsilon: float) -> Tensor:
        """x + gate · RMSNorm(y), where another norm follows. y may be overwritten."""

    def guided_step(
        self,
        state: Tensor,
        velocities: Sequence[Tensor],
        coefficients: Tensor,
        guidance: Tensor,
        *,
        keeps_norm: bool = False,
    ) -> Tensor:
        """See `reference.guided_step`; coefficients [S, K, K + 1] and guidance [S] are tables of all steps. Two
        velocities may be put together as `reference.rescaled_guidance` does it (`keeps_norm`)."""


class ReferenceOps:
    """Plain PyTorch, where work is done when it is called. `step`: int32 [1], the row of all tables."""

    def __init__(self, step: Tensor) -> None:
        self._step = step

    def linear(self, x: Tensor, layer: Linear) -> Tensor:
        return reference.linear(x, layer.weight, layer.bias)

    def gelu_linear(self, x: Tensor, layer: Linear) -> Tensor:
        return reference.gelu_tanh(self.linear(x, layer))

    def gated_linear(self, x: Tensor, layer: Linear) -> Tensor:
        return reference.silu_product(self.linear(x, layer))

    def joined_linear(self, left: Tensor, right: Tensor, layer: Linear) -> Tensor:
        return self.linear(torch.cat([left, right], dim=1), layer)

    def narrow_linear(self, x: Tensor, layer: Linear) -> Tensor:
        return self.linear(x, layer)

    def silu(self, x: Tensor) -> Tensor:
        return reference.silu(x)

    def sigmoid_product(self, x: Tensor, gate: Tensor) -> Tensor:
        return reference.sigmoid_product(x, gate)

    def residual_modulate(
        self, branches: Sequence[Branch], *, rms_epsilon: float | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        s = int(self._step)
        now = [Branch(b.x, b.shift[s], b.scale[s], None if b.gate is None else b.gate[s], b.y) for b in branches]
        return reference.residual_modulate(now, rms_epsilon)

    def gated_sum(self, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        return reference.gated_residual(x, gate[int(self._step)], y)

    def residual_rms(
        self, x: Tensor, scale: Tensor, gate: Tensor | None = None, y: Tensor | None = None, *, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        total = x if gate is None or y is None else self.gated_rms_sum(x, gate, y, epsilon=epsilon)
        return total, reference.rms_norm(total, epsilon) * scale[int(self._step)]

    def gated_rms_sum(self, x: Tensor, gate: Tensor, y: Tensor, *, epsilon: float) -> Tensor:
        return reference.gated_residual(x, gate[int(self._step)], reference.rms_norm(y, epsilon))

    def guided_step(
        self,
        state: Tensor,
        velocities: Sequence[Tensor],
        coefficients: Tensor,
        guidance: Tensor,
        *,
        keeps_norm: bool = False,
    ) -> Tensor:
        s = int(self._step)
        if keeps_norm and len(velocities) == 2:
            velocities = [reference.rescaled_guidance(velocities[0], velocities[1], float(guidance[s]))]
        return reference.guided_step(state, velocities, coefficients[s], float(guidance[s]))
