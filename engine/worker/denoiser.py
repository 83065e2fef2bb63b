"""Denoising steps of one model, recorded once a shape and replayed for any request, any members and any step.

The first step of a shape is recorded while the device is at it, in pieces (work_queue.py), so that a new shape costs
little more than what libraries take to choose their kernels.

Owns what recorded work reads: the step counter, the tables that it indexes, a branch's constants, the rows of the state
that this member steps, each at one place in the device's memory that is filled before a chunk. A step is a *pass* over
the sequence for each guidance branch, then a *tail*: branches put together, the solver's step. Knows no commands; what
peers do is the exchange's.
"""

import functools
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import msgspec
import torch
from torch import Tensor

from tetrion.engine.models.family import PREFIX, Constant, Model
from tetrion.engine.models.memory_budget import CACHED_PREFIXES
from tetrion.engine.models.ops import Ops
from tetrion.engine.parallel.exchange import Chunk, Exchange, Group, Rope, Stream
from tetrion.engine.parallel.group import BranchLayout, GroupShape, Shard, plan_group
from tetrion.engine.params import Params
from tetrion.engine.sampling.flow_match import Schedule
from tetrion.engine.shape import StepShape
from tetrion.engine.worker.work_queue import Recording, WorkQueue

TABLE_STEPS = 32
"""Rows of the tables. Those of a request with more steps are made, and its chunks run, in parts."""
MAX_RECORDED = 128
"""Passes, and as many tails."""
CACHED_TABLES = 8
CACHED_SCHEDULES = 64
CACHED_ROPES = 32


class State(NamedTuple):
    """A request's state as a device names it."""

    state_id: int
    slot: int


class StepTables:
    """What all recorded work of a model has in common.

    `step`: int32 [1], the row that the next step uses; each step ends by adding 1. `coefficients`: fp32
    [TABLE_STEPS, K, K + 1]. `guidance`: fp32 [TABLE_STEPS]. `vectors`: of each branch, [TABLE_STEPS, V, C].
    """

    def __init__(self, step: Tensor, num_state_rows: int, num_vectors: int, width: int, dtype: torch.dtype) -> None:
        device = step.device
        self.step = step
        self.coefficients = torch.zeros(TABLE_STEPS, num_state_rows, num_state_rows + 1, device=device)
        self.guidance = torch.zeros(TABLE_STEPS, device=device)
        self._vectors: dict[int, Tensor] = {}
        self._new = functools.partial(torch.zeros, TABLE_STEPS, num_vectors, width, dtype=dtype, device=device)

    def vectors(self, branch: int) -> Tensor:
        if branch not in self._vectors:
            self._vectors[branch] = self._new()
        return self._vectors[branch]

    def load(self, coefficients: Tensor, guidance: float, vectors: Mapping[int, Tensor]) -> None:
        """Enqueue: the next steps have these; at most TABLE_STEPS rows."""
        count = len(coefficients)
        self.coefficients[:count].copy_(coefficients)
        self.guidance.fill_(guidance)
        for branch, rows in vectors.items():
            assert len(rows) == count, f"{len(rows)} rows of vectors for {count} steps"
            self.vectors(branch)[:count].copy_(rows)
        self.step.zero_()


class Rows:
    """A member's image rows, as many as any rank has of a shape: `state` fp32 [n, K · channels], `velocity`: of each
    branch, [n, out_channels]."""

    def __init__(self, num_rows: int, width: int, out_channels: int, dtype: torch.dtype, device: torch.device) -> None:
        self.state = torch.zeros(num_rows, width, dtype=torch.float32, device=device)
        self._velocity: dict[int, Tensor] = {}
        self._new = functools.partial(torch.zeros, num_rows, out_channels, dtype=dtype, device=device)

    def velocity(self, branch: int) -> Tensor:
        if branch not in self._velocity:
            self._velocity[branch] = self._new()
        return self._velocity[branch]


class Pass:
    """One evaluation of the network for a branch, recorded. Before each `replay`: bind the exchange, `load`."""

    def __init__(self, denoiser: "Denoiser", group: Group, branch: int, constants: Mapping[str, Constant]) -> None:
        """constants: of any request of the shape; their shapes count."""
        self._denoiser, self._group, self._branch = denoiser, group, branch
        self._rows = denoiser.rows(group.shape)
        self._velocity = self._rows.velocity(branch)  # a recording must find its places as they are
        self._constants = {name: self._buffer(constant) for name, constant in constants.items()}
        spec = denoiser.model.spec
        if spec.prefix_blocks:
            self._constants[PREFIX] = denoiser.prefix_place(group.shape, branch)
        self.replay: Recording = denoiser.queue.record(self._run)

    def load(
        self, shape: StepShape, constants: Mapping[str, Constant], shard: Shard, prefix: Tensor | None = None
    ) -> None:
        """Enqueue: from now on for a request with these; `shard`: this member's; `prefix`: of all heads."""
        rows, heads = shard.rows, shard.key_heads
        if prefix is not None:
            self._constants[PREFIX].copy_(prefix[..., heads.start : heads.stop, :])
        for name, (tensor, segment) in constants.items():
            if segment is not None:
                tensor = tensor[rows[segment].start : rows[segment].stop]
            self._constants[name][: len(tensor)].copy_(tensor)
        rope = self._denoiser.rope(shape, self._branch)
        if rope is not None:
            self._group.load_rope(rope)  # always: passes of other branches over the same rows share the group

    def _buffer(self, constant: Constant) -> Tensor:
        tensor, segment = constant
        num_rows = len(tensor) if segment is None else self._group.shape.padded[segment]
        return tensor.new_zeros(num_rows, *tensor.shape[1:])

    def _run(self) -> None:
        denoiser = self._denoiser
        latents = self._rows.state[:, : denoiser.channels].to(denoiser.dtype)
        vectors = denoiser.tables.vectors(self._branch)
        velocity = denoiser.model.network.step(latents, self._constants, vectors, self._attend)
        self._velocity.copy_(velocity)

    def _attend(self, streams: Sequence[Stream]) -> Tensor:
        output = self._group.attend(streams)
        self.replay.cut()
        return output


class Tail(NamedTuple):
    """A recorded end of a step, and the rows that it steps, which live as long as what was recorded over them."""

    replay: Recording
    rows: Rows


class Denoiser:
    """Runs chunks of a model's steps on one device. `step`: the counter that `ops` looks at."""

    def __init__(
        self, model: Model, ops: Ops, exchange: Exchange, queue: WorkQueue, step: Tensor, dtype: torch.dtype
    ) -> None:
        spec, network = model.spec, model.network
        changing = spec.latents
        self.model, self.queue, self.dtype = model, queue, dtype
        self.channels = network.out_channels
        self._num_state_rows = changing.width // network.out_channels
        self._width = changing.width
        self.tables = StepTables(step, self._num_state_rows, network.num_vectors, network.hidden_size, dtype)
        self._ops, self._exchange = ops, exchange
        self._passes: OrderedDict[tuple[GroupShape, int], Pass] = OrderedDict()
        self._tails: OrderedDict[tuple[int, tuple[int, ...], int], Tail] = OrderedDict()
        self._rows: WeakValueDictionary[int, Rows] = WeakValueDictionary()
        self._vectors = functools.lru_cache(CACHED_TABLES)(self._compute_vectors)
        self._prefix = functools.lru_cache(CACHED_PREFIXES)(self._compute_prefix)
        self._prefix_places: dict[int, Tensor] = {}
        self._schedule = functools.lru_cache(CACHED_SCHEDULES)(self._compute_schedule)
        self._coefficients = functools.lru_cache(CACHED_SCHEDULES)(self._compute_coefficients)
        self._rope = functools.lru_cache(CACHED_ROPES)(model.network.rope)

    def chunk(
        self,
        shape: StepShape,
        members: tuple[int, ...],
        slot: int,
        chunk_index: int,
        source: int,
        versions: tuple[int, int],
    ) -> Chunk:
        """This device's part in a chunk of the group `members`. `versions`: before the first step, after the last."""
        spec, me = self.model.spec, self._exchange.device_id
        layout = BranchLayout(members=members, num_branches=shape.num_branches)
        part = layout.part_of(me)
        plans = tuple(
            plan_group(part, shape.counts(spec.segments, branch), spec.num_heads, spec.heads_per_key)
            for branch in layout.branches_of(me)
        )
        return Chunk(shape, layout, plans, slot, chunk_index, source, *versions)

    def rows(self, shape: GroupShape) -> Rows:
        """Of the segment that is stepped."""
        num_rows = shape.padded[self.model.spec.stepped]
        rows = self._rows.get(num_rows)
        if rows is None:
            size = self._width, self.model.network.out_channels
            self._rows[num_rows] = rows = Rows(num_rows, *size, self.dtype, self.queue.device)
        return rows

    def prefix_place(self, shape: GroupShape, branch: int) -> Tensor:
        """Where all passes of a branch find the prefix: it is large, and loaded before each chunk."""
        spec = self.model.spec
        if branch not in self._prefix_places:
            size = spec.max_prefix_elements
            self._prefix_places[branch] = torch.zeros(size, dtype=self.dtype, device=self.queue.device)
        own_heads = shape.own_heads // spec.heads_per_key
        view = shape.num_prefix(spec.stepped), spec.prefix_blocks, 2, own_heads, spec.head_dim
        return self._prefix_places[branch][: math.prod(view)].view(view)

    def rope(self, shape: StepShape, branch: int) -> Rope | None:
        """The same object for all branches and requests whose positions are the same, so that a group can tell."""
        return self._rope(msgspec.structs.replace(shape, text=shape.text[branch : branch + 1]), 0)

    def prepare(self, chunk: Chunk, state: State, params: Params, first_step: int) -> None:
        """Enqueue what a request needs once, if it is not there: the first steps' vectors, from fields that are in its
        slot as soon as the request is there at all."""
        for branch in chunk.layout.branches_of(self._exchange.device_id):
            self._vectors(state, params, branch, first_step // TABLE_STEPS)
            self._prefix(state, params.shape, branch)

    def run(self, chunk: Chunk, state: State, params: Params, steps: range) -> None:
        """Enqueue: the bound chunk's steps, from this member's rows of the state in its slot to all members' slots."""
        me = self._exchange.device_id
        branches = chunk.layout.branches_of(me)
        passes = [self._passes[plan.shape_of(me), b] for plan, b in zip(chunk.plans, branches, strict=True)]
        for recorded, plan, branch in zip(passes, chunk.plans, branches, strict=True):
            constants = self._constants(chunk.shape, state.slot, branch)
            recorded.load(chunk.shape, constants, plan.shard_of(me), self._prefix(state, params.shape, branch))
        tail, rows = self._tails[self._tail_key(chunk)]
        self._exchange.load_state(rows.state)
        for part in table_parts(steps):
            self._load_tables(state, params, branches, part)
            for _ in part:
                for recorded in passes:
                    recorded.replay()
                tail()
        self._exchange.share_state(rows.state)

    def make_room(self, chunk: Chunk) -> None:
        """Have places for what the chunk's steps read, before the chunk is bound. Those that are new are recorded when
        they first run."""
        me = self._exchange.device_id
        branches = chunk.layout.branches_of(me)
        passes = [(plan.shape_of(me), branch) for plan, branch in zip(chunk.plans, branches, strict=True)]
        tail = self._tail_key(chunk)
        for shape, branch in passes:
            if (shape, branch) not in self._passes:
                self._forget_one_of(self._passes)
                constants = self._constants(chunk.shape, chunk.slot, branch)
                self._passes[shape, branch] = Pass(self, self._exchange.group(shape), branch, constants)
            self._passes.move_to_end((shape, branch))
        if tail not in self._tails:
            self._forget_one_of(self._tails)
            self._tails[tail] = self._new_tail(self.rows(passes[0][0]), branches, chunk.shape.num_branches)
        self._tails.move_to_end(tail)

    def _forget_one_of(self, recorded: OrderedDict[Any, Any]) -> None:
        """The least recently used goes when there are too many."""
        if len(recorded) == MAX_RECORDED:
            self.queue.drain()
            recorded.popitem(last=False)

    def _new_tail(self, rows: Rows, branches: tuple[int, ...], num_branches: int) -> Tail:
        """What ends a step: `branches` are those that were evaluated here, of `num_branches`."""
        apart = len(branches) < num_branches
        swap = self._exchange.swap(len(rows.state), self.model.network.out_channels) if apart else None
        own, keeps_norm = [rows.velocity(branch) for branch in branches], self.model.keeps_norm

        def tail() -> None:
            velocities = list(own)
            if swap is not None:
                velocities.insert(1 - branches[0], swap.push(velocities[0]))
            tables = self.tables
            now, guidance = tables.coefficients, tables.guidance
            rows.state.copy_(self._ops.guided_step(rows.state, velocities, now, guidance, keeps_norm=keeps_norm))
            if swap is not None:
                swap.done()
            tables.step.add_(1)

        return Tail(self.queue.record(tail), rows)

    def _tail_key(self, chunk: Chunk) -> tuple[int, tuple[int, ...], int]:
        me = self._exchange.device_id
        num_rows = chunk.plans[0].shape_of(me).padded[self.model.spec.stepped]
        return num_rows, chunk.layout.branches_of(me), chunk.shape.num_branches

    def _constants(self, shape: StepShape, slot: int, branch: int) -> Mapping[str, Constant]:
        return self.model.network.constants(self._exchange.constants(slot, branch), shape, branch)

    def _load_tables(self, state: State, params: Params, branches: tuple[int, ...], steps: range) -> None:
        """Enqueue: the next replays are `steps`, all of one part of TABLE_STEPS steps."""
        part = steps.start // TABLE_STEPS
        rows = slice(steps.start - part * TABLE_STEPS, steps.stop - part * TABLE_STEPS)
        vectors = {branch: self._vectors(state, params, branch, part)[rows] for branch in branches}
        coefficients = self._coefficients(*_schedule_of(params))[steps.start : steps.stop]
        self.tables.load(coefficients, self.model.guidance_factor(params), vectors)

    def _compute_schedule(self, num_steps: int, skipped_steps: int, shape: StepShape) -> Schedule:
        return self.model.schedule(num_steps + skipped_steps, shape).after(skipped_steps)

    def _compute_coefficients(self, num_steps: int, skipped_steps: int, shape: StepShape) -> Tensor:
        return self.queue.to_device(self._schedule(num_steps, skipped_steps, shape).coefficients)

    def _compute_prefix(self, state: State, shape: StepShape, branch: int) -> Tensor | None:
        """`state` says whose."""
        if self.model.prefix is None:
            return None
        return self.model.prefix(self._exchange.constants(state.slot, branch), shape, branch)

    def _compute_vectors(self, state: State, params: Params, branch: int, part: int) -> Tensor:
        """Modulation vectors of a part's steps: [k, V, C]. `state` says whose."""
        times = self._schedule(*_schedule_of(params)).times[part * TABLE_STEPS : (part + 1) * TABLE_STEPS]
        fields = self._exchange.constants(state.slot, branch)
        return self.model.network.vectors(fields, self.queue.to_device(times), params)


def _schedule_of(params: Params) -> tuple[int, int, StepShape]:
    return params.num_steps, params.skipped_steps, params.shape


def table_parts(steps: range) -> Iterator[range]:
    """`steps` cut where a table of TABLE_STEPS steps ends."""
    start = steps.start
    while start < steps.stop:
        end = min(steps.stop, start - start % TABLE_STEPS + TABLE_STEPS)
        yield range(start, end)
        start = end
