"""Models of the exchange's tests: what a slab must know of them, and a network without weights whose rows are exact.

Programs of this folder import it too, so it knows nothing of the tests.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tetrion.engine.model_spec import ModelSpec, SchedulerSpec, Sizes, SlotField
from tetrion.engine.parallel.exchange import Prefix, Rope, Stream
from tetrion.engine.parallel.group import GroupPlan
from tetrion.engine.shape import Rows, StepShape

HEAD_DIM, CHANNELS, STATE_ROWS, TEXT_DIM, POOLED_DIM = 8, 8, 2, 12, 10


def toy_spec(
    name: str, segments: tuple[Rows, ...], num_heads: int, heads_per_key: int = 1, prefix_blocks: int = 0
) -> ModelSpec:
    """A model whose solver keeps two rows of state behind each token."""
    constants = (
        SlotField(name="text", rows="text", width=TEXT_DIM, per_branch=True),
        SlotField(name="pooled", rows="one", width=POOLED_DIM, per_branch=True),
        SlotField(name="reference", rows="reference", width=CHANNELS),
    )
    state = SlotField(name="latents", rows="image", width=STATE_ROWS * CHANNELS, fp32=True, changes=True)
    return ModelSpec(
        name=name, path="", family="toy", num_heads=num_heads, head_dim=HEAD_DIM, segments=segments,
        heads_per_key=heads_per_key, prefix_blocks=prefix_blocks,
        fields=(*constants[: 3 if "reference" in segments else 2], state), max_branches=2, scheduler=SchedulerSpec(),
        num_steps=4, guidance=0.0, max_text_tokens=13, max_pictures=1, reference_sizes=((160, 32),),
        sizes=Sizes(min=16, max=160, multiple=16, default=(160, 160)),
    )  # fmt: skip


SPECS = {
    spec.name: spec
    for spec in (
        toy_spec("two segments", ("text", "image"), num_heads=6),
        toy_spec("image first", ("image", "text"), num_heads=4),
        toy_spec("three segments", ("text", "image", "reference"), num_heads=5),
        toy_spec("grouped heads", ("text", "image"), num_heads=10, heads_per_key=2),
        toy_spec("text without queries", ("image", "text"), num_heads=10, heads_per_key=2, prefix_blocks=1),
    )
}
"""They share the pool: regions and slots are as large as the largest of them needs."""


class ToyNetwork:
    """A pass over the sequence for one branch and one step, for one member. Element-wise but for attention."""

    def __init__(self, spec: ModelSpec, shape: StepShape, plan: GroupPlan, device_id: int, branch: int) -> None:
        self._spec, self._branch = spec, branch
        self._shard, self._counts = plan.shard_of(device_id), plan.counts
        self._canonical = plan.canonical_rows(self._shard)
        self._padded = plan.shape_of(device_id).padded
        self._width = spec.num_heads * spec.head_dim

    def rope(self) -> Rope:
        """Of the whole sequence."""
        generator = torch.Generator().manual_seed(sum(self._counts))
        angles = torch.randn(sum(self._counts), self._spec.head_dim // 2, generator=generator)
        return angles.cos(), angles.sin()

    def velocity(
        self,
        step: int,
        fields: Mapping[str, Tensor],
        latents: Tensor,
        attend: Callable[[Sequence[Stream]], Tensor],
    ) -> Tensor:
        """Of the padded rows `latents` [n, CHANNELS]; `fields`: of the branch, whole."""
        generator = torch.Generator().manual_seed(1000 * step + self._branch)
        biases = self._local(torch.randn(sum(self._counts), self._spec.qkv_width, generator=generator))
        norms = 1 + 0.1 * torch.randn(2, len(biases), HEAD_DIM, generator=generator)
        hidden = [
            pad(latents if kind == "image" else self._own(index, fields[kind]), self._padded[index], self._width)
            for index, kind in enumerate(self._spec.segments)
        ]
        prefix = self._prefix(fields["text"]) if self._spec.prefix_blocks else None
        for streams in self._layers():
            qkvs = []
            for i, (segments, has_norm, has_rope) in enumerate(streams):
                qkv = torch.cat([biases[s] + hidden[s].repeat(1, 3)[:, : self._spec.qkv_width] for s in segments])
                own_norms = norms[:, i] if has_norm else (None, None)
                qkvs.append(Stream(qkv, segments, *own_norms, has_rope=has_rope))
            if len(streams) == 1 and streams[0][0] == (self._spec.stepped,):
                qkvs[0] = qkvs[0]._replace(prefix=prefix)
            over = [s for segments, _, _ in streams for s in segments]
            for s, part in zip(over, attend(qkvs).split([self._padded[s] for s in over]), strict=True):
                hidden[s] = 0.5 * hidden[s] + part
        return hidden[self._spec.stepped][:, :CHANNELS] + 0.01 * fields["pooled"][0, 0]

    def _layers(self) -> list[list[tuple[tuple[int, ...], bool, bool]]]:
        """Streams of each call: segments, whether q and k are normed, whether they are turned."""
        everything = tuple(range(len(self._spec.segments)))
        first, *rest = everything
        return [
            [((s,), True, True) for s in everything],
            [((self._spec.stepped,), False, True)],
            [(everything, True, True)],
            [((first,), True, False), (tuple(rest), False, True)],
        ]

    def _prefix(self, text: Tensor) -> Prefix:
        """Keys and values of the whole text, for this member's heads."""
        spec, heads, num_rows = self._spec, self._shard.key_heads, self._counts[self._spec.segments.index("text")]
        wide = text[:num_rows].repeat(1, self._width).unflatten(1, (-1, spec.num_heads, spec.head_dim))
        keys, values = wide[:, 0, heads.start : heads.stop], wide[:, 1, heads.start : heads.stop]
        return 0.5 * keys, values

    def _own(self, segment: int, tensor: Tensor) -> Tensor:
        rows = self._shard.rows[segment]
        return tensor[rows.start : rows.stop]

    def _local(self, tensor: Tensor) -> list[Tensor]:
        """This member's padded rows of a table in canonical order."""
        return [
            pad(tensor[rows.start : rows.stop], padded, tensor.shape[1])
            for rows, padded in zip(self._canonical, self._padded, strict=True)
        ]


def solver_step(state: Tensor, velocities: Sequence[Tensor]) -> Tensor:
    """Guides, then steps two rows of state a token."""
    velocity = velocities[0] if len(velocities) == 1 else velocities[1] + 3 * (velocities[0] - velocities[1])
    new, old = state.split(CHANNELS, dim=1)
    return torch.cat([0.9 * new + 0.05 * old + 0.1 * velocity, new - 0.3 * velocity], dim=1)


def pad(x: Tensor, num_rows: int, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[1], 0, num_rows - len(x)))
