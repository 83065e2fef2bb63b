"""The exchange of CPU workers: shared memory and blocking barriers. What it does, and why it is safe: exchange.py.

Every call has done its work when it returns; waits raise Aborted when the engine gives the group up.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.parallel.cpu.barrier import PairwiseBarrier
from tetrion.engine.parallel.cpu.slab import SharedSlabs
from tetrion.engine.parallel.exchange import Chunk, Prefix, Rope, Stream, prefix_of
from tetrion.engine.parallel.group import GroupPlan, GroupShape, Shard
from tetrion.engine.parallel.layout import Piece as SlotPiece
from tetrion.engine.parallel.words import INVALID_VERSION
from tetrion.kernels.reference import attention, qk_norm_rope

Qkv = tuple[Tensor, Tensor, Tensor]


class CpuExchange:
    """One worker's end of all groups, for one model."""

    def __init__(self, slabs: SharedSlabs, barrier: PairwiseBarrier, spec: ModelSpec) -> None:
        self.device_id = slabs.device_id
        self._slabs, self._barrier, self._spec = slabs, barrier, spec
        self._slot_layout = slabs.layout.slots[spec.name]
        self._groups: dict[GroupShape, CpuGroup] = {}
        self._swaps: dict[tuple[int, int], CpuSwap] = {}
        self._chunk: Chunk | None = None

    def group(self, shape: GroupShape) -> "CpuGroup":
        if shape not in self._groups:
            self._groups[shape] = CpuGroup(self._slabs, self._barrier, self._spec, shape)
        return self._groups[shape]

    def swap(self, num_rows: int, width: int) -> "CpuSwap":
        if (num_rows, width) not in self._swaps:
            self._swaps[num_rows, width] = swap = CpuSwap(self._slabs, self._barrier, num_rows, width)
            if self._chunk is not None:
                swap.bind(self._chunk.layout.partners_of(self.device_id))
        return self._swaps[num_rows, width]

    def bind(self, chunk: Chunk) -> None:
        self._chunk = chunk
        for plan in chunk.plans:
            self.group(plan.shape_of(self.device_id)).bind(plan)
        partners = chunk.layout.partners_of(self.device_id)
        for swap in self._swaps.values():
            swap.bind(partners)

    def pull_constants(self) -> None:
        chunk = self._bound
        if chunk.source != self.device_id:
            self._barrier.wait_state(chunk.source, chunk.slot, chunk.start_version)
            self._pull(self._slot_layout.constants(chunk.shape))

    def pull_state(self) -> None:
        chunk, me = self._bound, self.device_id
        slot, buffer, source, wanted = chunk.slot, chunk.start_buffer, chunk.source, chunk.start_version
        self._barrier.wait_version(source, slot, buffer, wanted)
        if source != me:
            self._slabs.version(me, slot, buffer).store(INVALID_VERSION)
            self._pull([self._slot_layout.state(chunk.shape, buffer)])
        if (found := self._slabs.version(source, slot, buffer).load()) != wanted:
            raise RuntimeError(f"slot {slot} on device {source} has version {found:#x}, wanted {wanted:#x}")
        if source != me:
            self._slabs.version(me, slot, buffer).store(wanted)

    def enter(self) -> None:
        chunk = self._bound
        self._barrier.arrive_and_wait(chunk.layout.members)
        self._slabs.version(self.device_id, chunk.slot, chunk.end_buffer).store(INVALID_VERSION)

    def load_state(self, rows: Tensor) -> None:
        own, chunk = self._own_rows, self._bound
        rows[: len(own)].copy_(self.state(chunk.slot, chunk.start_buffer)[own.start : own.stop])
        rows[len(own) :].zero_()

    def share_state(self, rows: Tensor) -> None:
        own, chunk = self._own_rows, self._bound
        members = chunk.layout.part_of(self.device_id)
        for member in (self.device_id, *(member for member in members if member != self.device_id)):
            state = self._slabs.state(member, self._spec.name, chunk.slot, chunk.end_buffer)
            state[own.start : own.stop].copy_(rows[: len(own)])
        self._barrier.arrive_and_wait(members)

    def finish(self) -> None:
        chunk = self._bound
        self.publish(chunk.slot, chunk.end_buffer, chunk.end_version)

    def constants(self, slot: int, branch: int) -> Mapping[str, Tensor]:
        return self._slabs.constants(self.device_id, self._spec.name, slot, branch)

    def state(self, slot: int, buffer: int) -> Tensor:
        return self._slabs.state(self.device_id, self._spec.name, slot, buffer)

    def publish(self, slot: int, buffer: int, version: int) -> None:
        self._slabs.version(self.device_id, slot, buffer).store(version)

    def outcome(self) -> Callable[[], None]:
        return lambda: None

    def warm_up(self) -> None:
        pass

    def reset(self) -> None:
        self._barrier.reset()

    def _pull(self, pieces: Sequence[SlotPiece]) -> None:
        for piece in pieces:
            self._slabs.copy(piece, self._bound.slot, self._bound.source)

    @property
    def _bound(self) -> Chunk:
        assert self._chunk is not None, "no chunk is bound"
        return self._chunk

    @property
    def _own_rows(self) -> range:
        """Of the stepped segment, which is the same in all branches."""
        return self._bound.plans[0].shard_of(self.device_id).rows[self._spec.stepped]


class CpuGroup:
    """Groups of one shape."""

    def __init__(self, slabs: SharedSlabs, barrier: PairwiseBarrier, spec: ModelSpec, shape: GroupShape) -> None:
        self.shape = shape
        self._slabs, self._barrier = slabs, barrier
        self._num_heads, self._head_dim, self._heads_per_key = spec.num_heads, spec.head_dim, spec.heads_per_key
        self._heads = [spec.num_heads, spec.num_key_heads, spec.num_key_heads]
        self._plan: GroupPlan | None = None
        self._rope: Rope | None = None
        self._local_rope: list[Rope] = []

    def bind(self, plan: GroupPlan) -> None:
        self._plan = plan
        self._turn()

    def load_rope(self, rope: Rope) -> None:
        if rope is not self._rope:
            self._rope = rope
            self._turn()

    def attend(self, streams: Sequence[Stream]) -> Tensor:
        over = [segment for stream in streams for segment in stream.segments]
        pieces = [self._pieces(stream) for stream in streams]
        local = [part for parts in pieces for part in parts]
        if self.shape.degree == 1:
            q, k, v = (torch.cat(tensors) if len(tensors) > 1 else tensors[0] for tensors in zip(*local, strict=True))
            prefix = prefix_of(streams)
            if prefix is not None:
                k, v = (torch.cat(parts) for parts in zip((k, v), prefix, strict=True))
            return attention(q, k, v).flatten(1)
        assert self._plan is not None, "no chunk is bound"
        own = self._plan.shard_of(self._slabs.device_id)
        self._push_qkv(over, local, own)
        self._wait_for_all()
        num_rows = sum(self.shape.counts[segment] for segment in over)
        output = attention(*self._own_qkv(own, num_rows, prefix_of(streams)))
        self._push_output(over, output, own)
        self._wait_for_all()
        return self._output(own.device_id, over).flatten(1)

    def _pieces(self, stream: Stream) -> list[Qkv]:
        """q, k, v of each of the stream's segments, [padded rows, heads, D] each, normed and turned."""
        qkv = stream.qkv.unflatten(1, (sum(self._heads), self._head_dim)).split(self._heads, dim=1)
        rows = [self.shape.padded[segment] for segment in stream.segments]
        assert len(stream.qkv) == sum(rows), f"{len(stream.qkv)} rows for segments {stream.segments} of {self.shape}"
        rope = None
        if stream.has_rope and self._local_rope:
            tables = zip(*(self._local_rope[segment] for segment in stream.segments), strict=True)
            cos, sin = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in tables)
            rope = cos, sin
        parts = qk_norm_rope(qkv, stream.q_norm, stream.k_norm, rope, stream.epsilon)
        return list(zip(*(part.split(rows) for part in parts), strict=True))

    def _turn(self) -> None:
        """Take this member's rows out of the rotary tables, with each value twice, padded."""
        if self._rope is None:
            return
        plan = self._plan
        if plan is None:
            starts = [(0, count) for count in self.shape.padded]
        else:
            canonical = plan.canonical_rows(plan.shard_of(self._slabs.device_id))
            starts = [(part.start, len(part)) for part in canonical]
        self._local_rope = []
        for (start, count), padded in zip(starts, self.shape.padded, strict=True):
            tables = []
            for table in self._rope:
                local = table.new_zeros(padded, 2 * table.shape[1])
                local[:count] = table[start : start + count].repeat_interleave(2, dim=1)
                tables.append(local)
            self._local_rope.append((tables[0], tables[1]))

    def _push_qkv(self, over: Sequence[int], local: Sequence[Qkv], own: Shard) -> None:
        num_rows = sum(self.shape.counts[segment] for segment in over)
        for peer in self._in_push_order(own):
            regions, start = self._qkv(peer, num_rows), 0
            for segment, parts in zip(over, local, strict=True):
                rows = own.rows[segment]
                for region, part, heads in zip(
                    regions, parts, (peer.heads, peer.key_heads, peer.key_heads), strict=True
                ):
                    theirs = part[: len(rows), heads.start : heads.stop]
                    region[start + rows.start : start + rows.stop].copy_(theirs)
                start += self.shape.counts[segment]

    def _own_qkv(self, own: Shard, num_rows: int, prefix: Prefix | None) -> Qkv:
        """What peers have pushed, and behind it the prefix, which nobody else writes."""
        if prefix is None:
            return self._qkv(own, num_rows)
        q, k, v = self._qkv(own, num_rows + len(prefix[0]))
        for region, rows in zip((k, v), prefix, strict=True):
            region[num_rows:].copy_(rows)
        return q[:num_rows], k, v

    def _push_output(self, over: Sequence[int], output: Tensor, own: Shard) -> None:
        """`output`: [all rows of those segments, own heads, D]."""
        heads = slice(own.heads.start, own.heads.stop)
        for peer in self._in_push_order(own):
            region, start, row = self._output(peer.device_id, over), 0, 0
            for segment in over:
                rows = peer.rows[segment]
                region[row : row + len(rows), heads].copy_(output[start + rows.start : start + rows.stop])
                start, row = start + self.shape.counts[segment], row + self.shape.padded[segment]

    def _qkv(self, shard: Shard, num_rows: int) -> Qkv:
        return self._slabs.qkv(shard.device_id, num_rows, len(shard.heads), self._head_dim, self._heads_per_key)

    def _output(self, device: int, over: Sequence[int]) -> Tensor:
        num_rows = sum(self.shape.padded[segment] for segment in over)
        return self._slabs.output(device, num_rows, self._num_heads, self._head_dim)

    def _in_push_order(self, own: Shard) -> tuple[Shard, ...]:
        """All members, starting with oneself, so that not everybody writes into the same slab at once."""
        assert self._plan is not None
        return self._plan.shards[own.rank :] + self._plan.shards[: own.rank]

    def _wait_for_all(self) -> None:
        assert self._plan is not None
        self._barrier.arrive_and_wait(self._plan.members)


class CpuSwap:
    """Velocities of partners, one of whom is this device."""

    def __init__(self, slabs: SharedSlabs, barrier: PairwiseBarrier, num_rows: int, width: int) -> None:
        self._slabs, self._barrier = slabs, barrier
        self._num_rows, self._width = num_rows, width
        self._partners: tuple[int, ...] = (slabs.device_id,)

    def bind(self, partners: tuple[int, ...]) -> None:
        self._partners = partners

    def push(self, velocity: Tensor) -> Tensor:
        for partner in set(self._partners) - {self._slabs.device_id}:
            self._region(partner).copy_(velocity)
        self._barrier.arrive_and_wait(self._partners)
        return self._region(self._slabs.device_id)

    def done(self) -> None:
        self._barrier.arrive_and_wait(self._partners)

    def _region(self, device: int) -> Tensor:
        return self._slabs.velocity(device, self._num_rows, self._width)
