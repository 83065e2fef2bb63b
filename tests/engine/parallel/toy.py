"""A toy model behind any exchange, and a request's first state: the same in every process, on every kind of device.

Text and image are its segments, the image is stepped, with two rows of state behind every token; a second guidance
branch has its own text. Only elementwise, so that rows stay exact; attention is what the exchange does.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.parallel.exchange import Chunk, Exchange, Group, Rope, Stream
from tetrion.engine.parallel.group import BranchLayout, GroupPlan, GroupShape, plan_group
from tetrion.engine.parallel.layout import NUM_BUFFERS
from tetrion.engine.parallel.words import slot_version
from tetrion.engine.shape import StepShape
from tetrion.kernels import reference

TEXT, IMAGE = 0, 1
MAX_STEPS = 64
STATE_ROWS = 2
Work = Callable[[], None]
GuidedStep = Callable[[Tensor, Sequence[Tensor], Tensor, Tensor, Tensor], Tensor]
"""kernels.guided_step's."""


def step_shape(text: Sequence[int], image: int, turned: int = 0) -> StepShape:
    """`turned`: pictures of as many rows that differ in nothing but their rotary tables."""
    return StepShape(width=turned, height=0, image=image, text=tuple(text))


def first_state(spec: ModelSpec, shape: StepShape, seed: int) -> list[dict[str, Tensor]]:
    """The fields of a new request, by branch, fp32."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            field.name: torch.randn(shape.rows(field.rows, branch), field.width, generator=generator)
            for field in spec.fields
            if field.per_branch or not branch
        }
        for branch in range(shape.num_branches)
    ]


def reference_step(
    state: Tensor, velocities: Sequence[Tensor], coefficients: Tensor, guidance: Tensor, step: Tensor
) -> Tensor:
    now = int(step)
    return reference.guided_step(state, velocities, coefficients[now], float(guidance[now]))


class Weights:
    """Of one branch, for a whole sequence."""

    def __init__(self, spec: ModelSpec, counts: Sequence[int], branch: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(1000 * counts[TEXT] + 10 * counts[IMAGE] + branch)
        width = spec.num_heads * spec.head_dim
        self.bias = torch.randn(sum(counts), 3 * width, generator=generator).to(dtype)
        self.norms = (1 + 0.1 * torch.randn(4, spec.head_dim, generator=generator)).to(dtype)


class Pass:
    """One evaluation for a branch on one member: buffers that are filled before a chunk."""

    def __init__(self, toy: "Toy", shape: GroupShape, branch: int) -> None:
        self.group: Group = toy.exchange.group(shape)
        self._weights = weights = Weights(toy.spec, shape.counts, branch, toy.dtype)
        self._norms, width = weights.norms.to(toy.device), weights.bias.shape[1] // 3
        rows = {"dtype": toy.dtype, "device": toy.device}
        self._text = torch.zeros(shape.padded[TEXT], width, **rows)
        self._pooled = torch.zeros(1, toy.channels, **rows)
        self._bias = torch.zeros(shape.num_local, 3 * width, **rows)
        self._prefix = torch.zeros(2, shape.counts[TEXT], shape.own_heads, toy.spec.head_dim, **rows)
        self.velocity = torch.zeros(shape.padded[IMAGE], toy.channels, **rows)

    def load(self, plan: GroupPlan, me: int, fields: dict[str, Tensor], rope: Rope) -> None:
        """This member's part of the request, once the slot holds it."""
        shard, first = plan.shard_of(me), len(self._text)
        text = shard.rows[TEXT]
        self._text[: len(text)] = fields["text"][text.start : text.stop]
        heads = fields["text"][: plan.counts[TEXT]].unflatten(1, (-1, self._prefix.shape[3]))
        self._prefix.copy_(heads[:, shard.heads.start : shard.heads.stop])
        self._pooled.copy_(fields["pooled"][:, : self._pooled.shape[1]])
        for rows, start in zip(plan.canonical_rows(shard), (0, first), strict=True):
            self._bias[start : start + len(rows)] = self._weights.bias[rows.start : rows.stop].to(self._bias.device)
        self.group.load_rope(rope)

    def run(self, state: Tensor) -> None:
        """Joint attention, attention of the image without norms that sees text whose keys are given, joint attention of
        one stream."""
        num_text, channels = len(self._text), self.velocity.shape[1]
        image = torch.nn.functional.pad(state[:, :channels].to(self._text.dtype), (0, self._text.shape[1] - channels))
        hidden = torch.cat([self._text, image])
        first, second = (self._bias + hidden.repeat(1, 3)).split([num_text, len(image)])
        streams = [
            Stream(first, (TEXT,), self._norms[0], self._norms[1]),
            Stream(second, (IMAGE,), self._norms[2], None, has_rope=False, epsilon=1e-5),
        ]
        hidden = 0.5 * hidden + self.group.attend(streams)
        text, image = hidden[:num_text], hidden[num_text:]
        keys, values = self._prefix
        alone = Stream(self._bias[num_text:] + image.repeat(1, 3), (IMAGE,), prefix=(keys, 0.5 * values))
        image = image + 0.5 * self.group.attend([alone])
        hidden = torch.cat([text, image])
        stream = Stream(self._bias + hidden.repeat(1, 3), (TEXT, IMAGE), self._norms[2], self._norms[3])
        hidden = hidden + self.group.attend([stream])
        self.velocity.copy_(hidden[num_text:, :channels] + 0.01 * self._pooled)


class Toy:
    """One device's worker: what it does with its end of the exchange. `record`: as WorkQueue's."""

    def __init__(
        self,
        exchange: Exchange,
        spec: ModelSpec,
        guided_step: GuidedStep,
        dtype: torch.dtype,
        device: torch.device,
        record: Callable[[Work], Work],
    ) -> None:
        self.exchange, self.spec, self.dtype, self.device = exchange, spec, dtype, device
        self._guided_step, self._record = guided_step, record
        self._width = next(field.width for field in spec.fields if field.changes)
        self.channels = self._width // STATE_ROWS
        generator = torch.Generator().manual_seed(1)
        solver = torch.tensor([[0.9, 0.05, 0.1], [0.2, 0.3, 0.5]])
        self._coefficients = (solver + 0.01 * torch.rand(MAX_STEPS, 2, 3, generator=generator)).to(device)
        self._guidance = (1 + torch.rand(MAX_STEPS, generator=generator)).to(device)
        self._step = torch.zeros(1, dtype=torch.int32, device=device)
        self._ropes: dict[tuple[int, tuple[int, ...]], Rope] = {}
        self._passes: dict[tuple[GroupShape, int], Pass] = {}
        self._steps: dict[tuple[tuple[GroupShape, ...], tuple[int, ...], int], tuple[Tensor, Work]] = {}

    def encode(self, slot: int, state_id: int, shape: StepShape) -> None:
        for branch, values in enumerate(first_state(self.spec, shape, state_id)):
            fields = self._fields(slot, branch, 0)
            for name, value in values.items():
                fields[name][: len(value)].copy_(value)
        self.exchange.publish(slot, 0, slot_version(state_id, 0))

    def state(self, slot: int, shape: StepShape, chunk_index: int) -> list[Tensor]:
        """All fields of a request that has so many chunks behind it in this device's slot, on the host."""
        rows = []
        for branch in range(shape.num_branches):
            fields = self._fields(slot, branch, chunk_index)
            for field in self.spec.fields:
                if field.per_branch or not branch:
                    rows.append(fields[field.name][: shape.rows(field.rows, branch)].float().cpu())
        return rows

    def _fields(self, slot: int, branch: int, chunk_index: int) -> dict[str, Tensor]:
        state = self.exchange.state(slot, chunk_index % NUM_BUFFERS)
        return {**self.exchange.constants(slot, branch), self.spec.latents.name: state}

    def chunk(
        self,
        shape: StepShape,
        members: Sequence[int],
        slot: int,
        chunk_index: int,
        source: int,
        state_ids: tuple[int, int],
        steps: range,
    ) -> Chunk:
        """`state_ids`: under which the start was published, and the end will be."""
        me, spec = self.exchange.device_id, self.spec
        layout = BranchLayout(members=tuple(members), num_branches=shape.num_branches)
        part = layout.part_of(me)
        plans = [plan_group(part, shape.counts(spec.segments, b), spec.num_heads) for b in layout.branches_of(me)]
        versions = [slot_version(*it) for it in zip(state_ids, (steps.start, steps.stop), strict=True)]
        return Chunk(shape, layout, tuple(plans), slot, chunk_index, source, *versions)

    def pull(self, chunk: Chunk) -> None:
        self.exchange.bind(chunk)
        self.exchange.pull_constants()
        self.exchange.pull_state()

    def denoise(self, chunk: Chunk, steps: range) -> None:
        me, exchange = self.exchange.device_id, self.exchange
        branches = chunk.layout.branches_of(me)
        state, run = self._recorded(chunk, branches)
        self.pull(chunk)
        exchange.enter()
        for plan, branch in zip(chunk.plans, branches, strict=True):
            fields = dict(exchange.constants(chunk.slot, branch))
            self._passes[plan.shape_of(me), branch].load(plan, me, fields, self._rope(chunk.shape.width, plan.counts))
        self._step.fill_(steps.start)
        exchange.load_state(state)
        for _ in steps:
            run()
        exchange.share_state(state)
        exchange.finish()

    def _rope(self, turned: int, counts: tuple[int, ...]) -> Rope:
        if (turned, counts) not in self._ropes:
            generator = torch.Generator().manual_seed(turned)
            angles = torch.randn(sum(counts), self.spec.head_dim // 2, generator=generator)
            self._ropes[turned, counts] = angles.cos(), angles.sin()
        return self._ropes[turned, counts]

    def _recorded(self, chunk: Chunk, branches: tuple[int, ...]) -> tuple[Tensor, Work]:
        """Rows of the state, and a step of theirs, recorded before the chunk is bound."""
        shapes = tuple(plan.shape_of(self.exchange.device_id) for plan in chunk.plans)
        key = shapes, branches, chunk.shape.num_branches
        if key not in self._steps:
            passes = [self._pass(shape, branch) for shape, branch in zip(shapes, branches, strict=True)]
            state = torch.zeros(shapes[0].padded[IMAGE], self._width, device=self.device)
            self._steps[key] = state, self._record(self._work(state, passes, branches, chunk.shape.num_branches))
        return self._steps[key]

    def _pass(self, shape: GroupShape, branch: int) -> Pass:
        if (shape, branch) not in self._passes:
            self._passes[shape, branch] = Pass(self, shape, branch)
        return self._passes[shape, branch]

    def _work(self, state: Tensor, passes: list[Pass], branches: tuple[int, ...], num_branches: int) -> Work:
        swap = self.exchange.swap(len(state), self.channels) if len(branches) < num_branches else None

        def work() -> None:
            for evaluated in passes:
                evaluated.run(state)
            velocities = [evaluated.velocity for evaluated in passes]
            if swap is not None:
                velocities.insert(1 - branches[0], swap.push(velocities[0]))
            state.copy_(self._guided_step(state, velocities, self._coefficients, self._guidance, self._step))
            if swap is not None:
                swap.done()
            self._step.add_(1)

        return work
