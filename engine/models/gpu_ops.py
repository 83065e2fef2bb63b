"""The transformer's operators for GPUs: library GEMMs, and the Triton kernels for what lies between them.

Owns what keeps a row's bits independent of how many rows are in a call, which cuBLAS mostly does but not always:
* below MIN_ROWS rows it takes other kernels, so fewer are padded;
* where sums are long and outputs few it splits sums below 86 rows, so fewer than LONG_MIN_ROWS are padded; without a
  bias it would up to 800, so such a layer is given one of zeros;
* of a sum of two GEMMs it splits the second's sums by the number of rows if they are long, so the long one comes first;
* for few output channels it splits sums by the number of rows, so those GEMMs always have NARROW_ROWS.

Modulation vectors come as tables of all steps; a counter in device memory says which row holds, so that one CUDA graph
serves every step. Runs on CPU tensors too, in Triton's interpreter.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tetrion.engine.models.ops import Linear
from tetrion.kernels.guided_step import guided_step
from tetrion.kernels.reference import Branch, gelu_tanh
from tetrion.kernels.rescaled_guidance import rescaled_guidance
from tetrion.kernels.residual_modulate import residual_modulate
from tetrion.kernels.residual_rms import gated_rms_sum, residual_rms
from tetrion.kernels.sigmoid_product import sigmoid_product
from tetrion.kernels.silu_product import silu_product

MIN_ROWS = 64
LONG_SUMS, LONG_MIN_ROWS = 3, 128
"""From how many inputs an output on a layer's sums are long; how many rows it has at least."""
NARROW_ROWS = 1024


class GpuOps:
    """`step`: int32 [1] on the device, the row of all modulation tables."""

    def __init__(self, step: Tensor) -> None:
        self._step = step
        self._zeros: dict[tuple[int, torch.dtype], Tensor] = {}

    def linear(self, x: Tensor, layer: Linear) -> Tensor:
        outputs, inputs = layer.weight.shape
        if inputs < LONG_SUMS * outputs:
            return F.linear(_padded(x), layer.weight, layer.bias)[: len(x)]
        return F.linear(_padded(x, LONG_MIN_ROWS), layer.weight, self._bias(layer))[: len(x)]

    def gelu_linear(self, x: Tensor, layer: Linear) -> Tensor:
        """On CUDA the GELU is the GEMM's epilogue: the hidden layer, the widest tensor of all, is written once."""
        if not x.is_cuda:
            return gelu_tanh(self.linear(x, layer))
        return torch._addmm_activation(self._bias(layer), _padded(x), layer.weight.t(), use_gelu=True)[: len(x)]

    def gated_linear(self, x: Tensor, layer: Linear) -> Tensor:
        return silu_product(self.linear(x, layer))

    def joined_linear(self, left: Tensor, right: Tensor, layer: Linear) -> Tensor:
        """Two GEMMs, the second onto the first's result: [left | right] is never written side by side."""
        width = left.shape[1]
        result = F.linear(_padded(right), layer.weight[:, width:], self._bias(layer))
        return result.addmm_(_padded(left), layer.weight[:, :width].t())[: len(left)]

    def narrow_linear(self, x: Tensor, layer: Linear) -> Tensor:
        parts = F.pad(x, (0, 0, 0, -len(x) % NARROW_ROWS)).split(NARROW_ROWS)
        return torch.cat([F.linear(part, layer.weight, layer.bias) for part in parts])[: len(x)]

    def silu(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def sigmoid_product(self, x: Tensor, gate: Tensor) -> Tensor:
        return sigmoid_product(x, gate)

    def residual_modulate(
        self, branches: Sequence[Branch], *, rms_epsilon: float | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """The sum takes y's place."""
        return residual_modulate(branches, step=self._step, rms_epsilon=rms_epsilon)

    def guided_step(
        self,
        state: Tensor,
        velocities: Sequence[Tensor],
        coefficients: Tensor,
        guidance: Tensor,
        *,
        keeps_norm: bool = False,
    ) -> Tensor:
        if keeps_norm and len(velocities) == 2:
            velocities = [rescaled_guidance(velocities[0], velocities[1], guidance, self._step)]
        return guided_step(state, velocities, coefficients, guidance, self._step)

    def gated_sum(self, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        return torch.addcmul(x, gate.index_select(0, self._step), y)

    def residual_rms(
        self, x: Tensor, scale: Tensor, gate: Tensor | None = None, y: Tensor | None = None, *, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        """The sum takes y's place."""
        return residual_rms(x, scale, gate, y, epsilon=epsilon, step=self._step)

    def gated_rms_sum(self, x: Tensor, gate: Tensor, y: Tensor, *, epsilon: float) -> Tensor:
        return gated_rms_sum(x, gate, y, epsilon=epsilon, step=self._step)

    def _bias(self, layer: Linear) -> Tensor:
        """The layer's, or zeros."""
        if layer.bias is not None:
            return layer.bias
        key = len(layer.weight), layer.weight.dtype
        if key not in self._zeros:
            self._zeros[key] = layer.weight.new_zeros(key[0])
        return self._zeros[key]


def _padded(x: Tensor, num_rows: int = MIN_ROWS) -> Tensor:
    return x if len(x) >= num_rows else F.pad(x, (0, 0, 0, num_rows - len(x)))
