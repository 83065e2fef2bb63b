"""What a step computes, found by running a family's forward pass on shapes alone: its GEMMs and attentions, in order.

Owns the operators and attention that record; knows no family. The step's library floor, its FLOPs and what it takes of
a device's memory all come from here.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tetrion.engine.config import LoadFormat
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.family import PREFIX
from tetrion.engine.models.loading import planned_shapes
from tetrion.engine.models.ops import Linear
from tetrion.engine.models.registry import family_module
from tetrion.engine.parallel.exchange import Stream, prefix_of
from tetrion.engine.parallel.group import BranchLayout, GroupShape
from tetrion.engine.shape import StepShape
from tetrion.kernels.reference import Branch


class Gemm(NamedTuple):
    """[rows, inputs] @ [outputs, inputs]^T, with or without a bias."""

    rows: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs


class Attention(NamedTuple):
    """`heads_per_key`: so many heads share one of keys and values. `prefix`: rows that have keys and values only."""

    tokens: int
    heads: int
    head_dim: int
    heads_per_key: int = 1
    prefix: int = 0

    @property
    def flops(self) -> int:
        return 4 * self.tokens * (self.tokens + self.prefix) * self.heads * self.head_dim


Operator = Gemm | Attention


def step_operators(spec: ModelSpec, shape: StepShape, degree: int) -> list[Operator]:
    """What the device with most rows and heads computes in a step at `degree`, all guidance branches that its part of
    the group evaluates. Modulation vectors are no part of it."""
    layout = BranchLayout(members=tuple(range(degree)), num_branches=shape.num_branches)
    part_degree = len(layout.part_of(0))
    return [
        operator for branch in layout.branches_of(0) for operator in pass_operators(spec, shape, part_degree, branch)
    ]


def pass_operators(spec: ModelSpec, shape: StepShape, degree: int, branch: int) -> list[Operator]:
    """Of one evaluation of the network for a branch, by the first of `degree` members."""
    most_heads = -(-spec.num_key_heads // degree) * spec.heads_per_key
    group = GroupShape(shape.counts(spec.segments, branch), degree, most_heads)
    recorder = Recorder(spec, group)
    network = family_module(spec).network(spec, _meta_weights(spec), recorder)
    fields = {field.name: _meta(shape.rows(field.rows, branch), field.width) for field in spec.fields}
    constants = {
        name: tensor if segment is None else tensor.new_empty(group.padded[segment], *tensor.shape[1:])
        for name, (tensor, segment) in network.constants(fields, shape, branch).items()
    }
    if spec.prefix_blocks:
        own_heads = most_heads // spec.heads_per_key
        constants[PREFIX] = _meta(group.num_prefix(spec.stepped), spec.prefix_blocks, 2, own_heads, spec.head_dim)
    latents = _meta(group.padded[spec.stepped], network.out_channels)
    network.step(latents, constants, _meta(1, network.num_vectors, network.hidden_size), recorder.attend)
    return recorder.operators


class Recorder:
    """`models.ops.Ops` and `models.family.Attend` of one member on meta tensors."""

    def __init__(self, spec: ModelSpec, shape: GroupShape) -> None:
        self.operators: list[Operator] = []
        self._spec, self._shape = spec, shape

    def attend(self, streams: Sequence[Stream]) -> Tensor:
        over = [segment for stream in streams for segment in stream.segments]
        tokens = sum(self._shape.counts[segment] for segment in over)
        spec, prefix = self._spec, prefix_of(streams)
        num_prefix = 0 if prefix is None else len(prefix[0])
        attention = Attention(tokens, self._shape.own_heads, spec.head_dim, spec.heads_per_key, num_prefix)
        self.operators.append(attention)
        return _meta(sum(self._shape.padded[segment] for segment in over), self._spec.hidden_size)

    def linear(self, x: Tensor, layer: Linear) -> Tensor:
        outputs, inputs = layer.weight.shape
        self.operators.append(Gemm(len(x), inputs, outputs))
        return _meta(len(x), outputs)

    gelu_linear = narrow_linear = linear

    def gated_linear(self, x: Tensor, layer: Linear) -> Tensor:
        return self.linear(x, layer)[:, : len(layer.weight) // 2]

    def joined_linear(self, left: Tensor, right: Tensor, layer: Linear) -> Tensor:
        return self.linear(left, layer)

    def silu(self, x: Tensor) -> Tensor:
        return x

    def sigmoid_product(self, x: Tensor, gate: Tensor) -> Tensor:
        return x

    def residual_modulate(
        self, branches: Sequence[Branch], *, rms_epsilon: float | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        return [(branch.x, torch.empty_like(branch.x)) for branch in branches]

    def gated_sum(self, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        return x

    def residual_rms(
        self, x: Tensor, scale: Tensor, gate: Tensor | None = None, y: Tensor | None = None, *, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        return x, torch.empty_like(x)

    def gated_rms_sum(self, x: Tensor, gate: Tensor, y: Tensor, *, epsilon: float) -> Tensor:
        return x

    def guided_step(
        self,
        state: Tensor,
        velocities: Sequence[Tensor],
        coefficients: Tensor,
        guidance: Tensor,
        *,
        keeps_norm: bool = False,
    ) -> Tensor:
        return state


def _meta_weights(spec: ModelSpec) -> Mapping[str, Tensor]:
    """The network's, by name; its configuration suffices."""
    load_format: LoadFormat = "dummy"
    component = family_module(spec).components(spec, load_format)["transformer"]
    shapes = planned_shapes({"transformer": component})
    return {name.partition("/")[2]: _meta(*shape) for name, shape in shapes.items()}


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")
