"""The exchange of GPU workers: what exchange.py says, each word of which only enqueues work on the current stream.

Owns what a worker's kernels share (counts, status, scratch) and the order in which they are enqueued; knows no family
and no commands. All on ONE stream.

Members, ranks, own rows, slot and versions are words in device memory that `bind` fills by one small copy, and peers'
slabs are reached through `bases`. What depends on a group's shape alone (ranges of rows and heads, rotary tables) lies
at one place for each shape. So one CUDA graph of passes and swaps serves every set of members, every slot and every
step; it may hold `attend`, `push` and `done`, never what stands around a chunk's steps. While the words are those of a
*rehearsal* every member is this device and nothing is stored: that is how what stands around the steps is warmed up.

Why no region is overwritten while somebody still reads it: exchange.py's argument, with "after" meaning stream order on
each device and the barrier's release and acquire between devices. Two things differ. A host does not wait, so an abort
does not stop it: `status` makes all further barriers return at once and all further kernels store nothing where others
could see it, and nothing is published. And versions are written by kernels; the host learns the outcome from a copy of
`status` behind the chunk.

Uneven splits are padded (GroupShape): a member's own rows of a segment come first, the others hold left-overs that
nobody reads.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.parallel.cpu.barrier import Aborted
from tetrion.engine.parallel.exchange import Chunk, Rope, Stream, prefix_of
from tetrion.engine.parallel.gpu.slab import GpuSlabs
from tetrion.engine.parallel.gpu.word_upload import WordUpload
from tetrion.engine.parallel.group import GroupShape, split, split_heads
from tetrion.engine.parallel.layout import Piece as SlotPiece
from tetrion.engine.parallel.layout import scratch_elements
from tetrion.kernels.attention_backend import Choice, attend
from tetrion.kernels.barrier import ABORTED, barrier
from tetrion.kernels.chunk_words import chunk_words, lanes_for, lists_of, num_words, publishing_words, rehearsal_words
from tetrion.kernels.group_table import group_words
from tetrion.kernels.output_push import output_push
from tetrion.kernels.qk_norm_rope_push import Piece, qk_norm_rope_push
from tetrion.kernels.slot_version import NUM_STATUS_WORDS, WRONG_VERSION, SlotVersions
from tetrion.kernels.state_place import Place
from tetrion.kernels.state_pull import state_pull
from tetrion.kernels.state_push import state_push
from tetrion.kernels.state_read import state_read
from tetrion.kernels.velocity_push import velocity_push


class QkvPlace(NamedTuple):
    """Slabs' addresses by device, the three regions' offsets in bytes, and this device's own: [rows, heads, D]; k and v
    may have fewer heads."""

    bases: Tensor
    offsets: tuple[int, int, int]
    regions: tuple[Tensor, Tensor, Tensor]


def raise_for_status(status: Sequence[int]) -> None:
    """`status`: its two words after a chunk. Raises Aborted or RuntimeError unless all went well."""
    broken, outcome = status
    if WRONG_VERSION in (broken, outcome):
        raise RuntimeError("the slot that state was pulled from was already further than the version wanted")
    if broken == ABORTED:
        raise Aborted("the engine aborted what was running")
    assert broken == outcome == 0, f"status {broken}, {outcome}"


class SharedResources:
    """What the exchanges of all models of a worker have in common, sized for the largest. Groups and swaps are to be
    made only once all slabs are where they stay (see GpuMemory)."""

    def __init__(
        self,
        slabs: GpuSlabs,
        abort: Tensor,
        clear_abort: Callable[[], None],
        specs: Sequence[ModelSpec],
        attention: Choice = "auto",
    ) -> None:
        """`abort`: this device's abort word as kernels see it, int32 [1]; `clear_abort` clears it."""
        num_devices, device = slabs.layout.num_devices, slabs.device
        self.slabs, self.attention, self.abort = slabs, attention, abort
        self.status = torch.zeros(NUM_STATUS_WORDS, dtype=torch.int32, device=device)
        """See slot_version.py."""
        self.expected = torch.zeros(num_devices, dtype=torch.int32, device=device)
        self.lanes = lanes_for(num_devices)
        self.upload = WordUpload(device, num_words(self.lanes))
        queries, keys = scratch_elements(specs)
        self._scratch = torch.zeros(queries + 2 * keys, dtype=slabs.dtype, device=device)
        self._scratch_starts = 0, queries, queries + keys
        self._scratch_bases = torch.full_like(slabs.bases, self._scratch.data_ptr())
        self._clear_abort = clear_abort

    def new_words(self) -> Tensor:
        """Words of a chunk, to be filled."""
        return torch.zeros(num_words(self.lanes), dtype=torch.int32, device=self.slabs.device)

    def versions(self, words: Tensor) -> SlotVersions:
        slabs = self.slabs
        offset = slabs.layout.versions_offset
        return SlotVersions(
            words, slabs.bases, self.abort, self.status, device_id=slabs.device_id, versions_offset=offset
        )

    def wait_for(self, devices: Tensor) -> None:
        """Enqueue a barrier. `devices`: one of the lists of a chunk's words."""
        barrier(
            devices,
            self.slabs.bases,
            self.expected,
            self.abort,
            self.status,
            device_id=self.slabs.device_id,
            counters_offset=self.slabs.layout.counters_offset,
        )

    def qkv(self, shape: GroupShape, head_dim: int, heads_per_key: int) -> QkvPlace:
        """Where q, k, v of a group go. One device alone has room for all heads in scratch memory of its own GPU."""
        slabs, layout = self.slabs, self.slabs.layout
        if shape.degree > 1:
            regions = slabs.qkv(slabs.device_id, shape.num_tokens, shape.own_heads, head_dim, heads_per_key)
            return QkvPlace(slabs.bases, (layout.q_offset, layout.k_offset, layout.v_offset), regions)
        key_heads = shape.own_heads // heads_per_key
        q, k, v = (
            self._scratch[start : start + shape.num_tokens * heads * head_dim].view(shape.num_tokens, heads, head_dim)
            for start, heads in zip(self._scratch_starts, (shape.own_heads, key_heads, key_heads), strict=True)
        )
        q_start, k_start, v_start = (start * self._scratch.element_size() for start in self._scratch_starts)
        return QkvPlace(self._scratch_bases, (q_start, k_start, v_start), (q, k, v))

    def reset(self) -> None:
        """Forget all barriers and the abort. Waits for the device. On every device while all are idle."""
        self.synchronize()
        for words in (self.slabs.counters(), self.expected, self.status):
            words.zero_()
        self.synchronize()
        self._clear_abort()

    def synchronize(self) -> None:
        if self.slabs.device.type == "cuda":
            torch.cuda.synchronize(self.slabs.device)


class GpuExchange:
    """One worker's end of all groups, for one model. `to_host`: enqueues a copy to the host (WorkQueue.to_host)."""

    def __init__(self, shared: SharedResources, spec: ModelSpec, to_host: Callable[[Tensor], Tensor]) -> None:
        slabs = shared.slabs
        self.device_id = slabs.device_id
        self._shared, self._spec, self._to_host = shared, spec, to_host
        self._slot_layout = slabs.layout.slots[spec.name]
        self._words, self._publishing = shared.new_words(), shared.new_words()
        self._part, self._everyone, self._partners = lists_of(self._words)
        self._versions, self._published = shared.versions(self._words), shared.versions(self._publishing)
        self._groups: WeakValueDictionary[GroupShape, GpuGroup] = WeakValueDictionary()
        self._swaps: dict[tuple[int, int], DeviceSwap] = {}
        self._chunk: Chunk | None = None
        latents = self._slot_layout.latents
        self._place = Place(slabs.layout.slot_offset(0) + latents.offset, slabs.layout.slot_bytes, latents.part_bytes)
        self._width = latents.field.width
        self._rehearse()

    def group(self, shape: GroupShape) -> "GpuGroup":
        """One object a shape, as long as somebody has it. It may allocate: not while a graph is recorded."""
        group = self._groups.get(shape)
        if group is None:
            self._groups[shape] = group = GpuGroup(self._shared, self._spec, shape, self._words)
        return group

    def swap(self, num_rows: int, width: int) -> "DeviceSwap":
        """Not while a graph is recorded."""
        if (num_rows, width) not in self._swaps:
            self._swaps[num_rows, width] = DeviceSwap(self._shared, self._words, num_rows, width)
        return self._swaps[num_rows, width]

    def _rehearse(self) -> None:
        """Until the next `bind`, kernels signal nobody and touch no slot."""
        self._chunk = None
        self._shared.upload.copy(rehearsal_words(self.device_id, self._shared.lanes), self._words)

    def bind(self, chunk: Chunk) -> None:
        me, layout, slabs = self.device_id, chunk.layout, self._shared.slabs
        part, shard = layout.part_of(me), chunk.plans[0].shard_of(me)
        missing = {*layout.members, chunk.source} - set(slabs.mapped)
        assert not missing, f"slabs of devices {sorted(missing)} are not mapped"
        assert all(plan.members == part for plan in chunk.plans), f"{chunk.plans} are not of {part}"
        assert 0 <= chunk.slot < slabs.layout.num_slots, f"slot {chunk.slot} of {slabs.layout.num_slots}"
        words = chunk_words(
            me,
            self._shared.lanes,
            slot=chunk.slot,
            source=chunk.source,
            start_version=chunk.start_version,
            end_version=chunk.end_version,
            start_buffer=chunk.start_buffer,
            end_buffer=chunk.end_buffer,
            part=part,
            rows=shard.rows[self._spec.stepped],
            everyone=layout.members,
            partners=layout.partners_of(me),
        )
        self._shared.upload.copy(words, self._words)
        self._chunk = chunk

    def pull_constants(self) -> None:
        chunk = self._bound
        if chunk.source != self.device_id:
            self._versions.wait_for_state()
            self._pull(self._slot_layout.constants(chunk.shape))

    def pull_state(self) -> None:
        chunk = self._bound
        self._versions.wait()
        if chunk.source != self.device_id:
            self._pull([self._slot_layout.state(chunk.shape, chunk.start_buffer)])
        self._versions.confirm(in_group=len(chunk.layout.members) > 1)

    def enter(self) -> None:
        self._shared.wait_for(self._everyone)
        self._versions.invalidate()

    def load_state(self, rows: Tensor) -> None:
        assert rows.shape[1] == self._width, f"{tuple(rows.shape)} for rows of {self._width}"
        state_read(rows, self._words, self._shared.slabs.bases, self._place, device_id=self.device_id)

    def share_state(self, rows: Tensor) -> None:
        assert rows.shape[1] == self._width, f"{tuple(rows.shape)} for rows of {self._width}"
        degree = 1 if self._chunk is None else self._chunk.plans[0].degree
        state_push(rows, self._words, self._shared.status, self._shared.slabs.bases, self._place, degree=degree)
        if degree > 1:
            self._shared.wait_for(self._part)

    def finish(self) -> None:
        self._versions.publish()

    def constants(self, slot: int, branch: int) -> Mapping[str, Tensor]:
        return self._shared.slabs.constants(self.device_id, self._spec.name, slot, branch)

    def state(self, slot: int, buffer: int) -> Tensor:
        return self._shared.slabs.state(self.device_id, self._spec.name, slot, buffer)

    def publish(self, slot: int, buffer: int, version: int) -> None:
        words = publishing_words(self.device_id, self._shared.lanes, slot, buffer, version)
        self._shared.upload.copy(words, self._publishing)
        self._published.wait()
        self._published.publish()

    def outcome(self) -> Callable[[], None]:
        status = self._to_host(self._shared.status)
        return lambda: raise_for_status(status.tolist())

    def warm_up(self) -> None:
        """A step's kernels depend on its shape, and are loaded when it first runs."""
        self._rehearse()
        rows = torch.zeros(1, self._width, dtype=torch.float32, device=self._shared.slabs.device)
        self._versions.wait_for_state()
        self._versions.wait()
        self._pull([SlotPiece(0, 1)])
        for in_group in (False, True):
            self._versions.confirm(in_group=in_group)
        self.enter()
        self.load_state(rows)
        self.share_state(rows)
        self.finish()
        self._shared.synchronize()

    def reset(self) -> None:
        self._shared.reset()

    @property
    def _bound(self) -> Chunk:
        assert self._chunk is not None, "no chunk is bound"
        return self._chunk

    def _pull(self, pieces: Sequence[SlotPiece]) -> None:
        layout = self._shared.slabs.layout
        state_pull(
            pieces,
            self._words,
            self._shared.status,
            self._shared.slabs.bases,
            device_id=self.device_id,
            slots_offset=layout.slots_offset,
            slot_bytes=layout.slot_bytes,
        )


class GpuGroup:
    """What all groups of one shape share on this device: table, views, rotary tables."""

    def __init__(self, shared: SharedResources, spec: ModelSpec, shape: GroupShape, words: Tensor) -> None:
        """`words`: those of the exchange's chunk."""
        slabs, most = shared.slabs, [spec.max_rows(segment) for segment in spec.segments]
        assert len(shape.counts) == len(most), f"{shape} for segments {spec.segments}"
        assert all(count <= at_most for count, at_most in zip(shape.counts, most, strict=True)), f"{shape}, max {most}"
        self.shape = shape
        self._shared, self._words, self._part = shared, words, lists_of(words)[0]
        self._num_heads, self._head_dim, self._heads_per_key = spec.num_heads, spec.head_dim, spec.heads_per_key
        segments = [split(count, shape.degree) for count in shape.counts]
        table = group_words(segments, split_heads(spec.num_heads, spec.heads_per_key, shape.degree))
        on_host = torch.tensor(table, dtype=torch.int32)
        if slabs.device.type == "cuda":
            on_host = on_host.pin_memory()  # from elsewhere the copy would wait for all that is enqueued
        self._table = on_host.to(slabs.device, non_blocking=True)
        self._qkv = shared.qkv(shape, spec.head_dim, spec.heads_per_key)
        if shape.degree > 1:
            self._output = slabs.output(slabs.device_id, shape.num_local, spec.num_heads, spec.head_dim).flatten(1)
        size = (shape.num_tokens, spec.head_dim // 2)
        self._rope = torch.ones(size, device=slabs.device), torch.zeros(size, device=slabs.device)
        self._loaded: Rope | None = None

    def load_rope(self, rope: Rope) -> None:
        """Enqueue; of the tables that are loaded already nothing is copied. They may be on the host."""
        if self._loaded is None or any(new is not old for new, old in zip(rope, self._loaded, strict=True)):
            for ours, table in zip(self._rope, rope, strict=True):
                pinned = ours.is_cuda and not table.is_cuda
                ours.copy_(table.pin_memory() if pinned else table, non_blocking=True)
            self._loaded = rope

    def attend(self, streams: Sequence[Stream]) -> Tensor:
        """May be recorded."""
        shared, shape = self._shared, self.shape
        over = [segment for stream in streams for segment in stream.segments]
        qk_norm_rope_push(
            [piece for stream in streams for piece in self._pieces(stream)],
            self._rope,
            self._table,
            self._words,
            shared.status,
            self._qkv.bases,
            self._qkv.offsets,
            degree=shape.degree,
            num_heads=self._num_heads,
            head_dim=self._head_dim,
            heads_per_key=self._heads_per_key,
        )
        self._wait_for_all()
        num_rows = sum(shape.counts[segment] for segment in over)
        q, k, v = (region[:num_rows] for region in self._qkv.regions)
        if (prefix := prefix_of(streams)) is not None:  # behind what peers push
            _, k, v = (region[: num_rows + len(prefix[0])] for region in self._qkv.regions)
            for region, rows in zip((k, v), prefix, strict=True):
                region[num_rows:].copy_(rows)
        output = attend(q, k, v, shared.attention)
        if shape.degree == 1:
            return output.flatten(1)
        padded = [shape.padded[segment] for segment in over]
        output_push(
            output,
            over,
            padded,
            self._table,
            self._words,
            shared.status,
            shared.slabs.bases,
            shared.slabs.layout.output_offset,
            degree=shape.degree,
            num_heads=self._num_heads,
            heads_per_key=self._heads_per_key,
        )
        self._wait_for_all()
        return self._output[: sum(padded)]

    def _pieces(self, stream: Stream) -> list[Piece]:
        """The stream's segments one by one."""
        rows = [self.shape.padded[segment] for segment in stream.segments]
        assert len(stream.qkv) == sum(rows), f"{len(stream.qkv)} rows for segments {stream.segments} of {self.shape}"
        weights = stream.q_norm, stream.k_norm, stream.has_rope, stream.epsilon
        return [
            Piece(part, segment, *weights)
            for part, segment in zip(stream.qkv.split(rows), stream.segments, strict=True)
        ]

    def _wait_for_all(self) -> None:
        if self.shape.degree > 1:
            self._shared.wait_for(self._part)


class DeviceSwap:
    """Velocities of partners. Both words may be recorded."""

    def __init__(self, shared: SharedResources, words: Tensor, num_rows: int, width: int) -> None:
        slabs = shared.slabs
        self._shared, self._words, self._partners = shared, words, lists_of(words)[2]
        self._theirs = slabs.velocity(slabs.device_id, num_rows, width)

    def push(self, velocity: Tensor) -> Tensor:
        assert velocity.shape == self._theirs.shape and velocity.dtype == self._theirs.dtype, f"{velocity.shape}"
        shared, slabs = self._shared, self._shared.slabs
        velocity_push(
            velocity,
            self._partners,
            self._words,
            shared.status,
            slabs.bases,
            slabs.layout.velocity_offset,
            device_id=slabs.device_id,
        )
        shared.wait_for(self._partners)
        return self._theirs

    def done(self) -> None:
        self._shared.wait_for(self._partners)
