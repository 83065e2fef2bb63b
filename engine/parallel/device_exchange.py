"""The exchange of a GPU worker: the words of exchange.py, each of which only enqueues work on the current stream.

Owns what a worker's kernels share (counts, status, scratch) and the order in which they are enqueued; knows no model
and no commands. A chunk of steps on one member, all on ONE stream:

    group = exchange.group(shape)       once a shape
    group.bind(plan, slot, …)           the chunk's words: one small copy
    group.pull_pooled()                 a newcomer's early part of it
    group.pull_state()                  wait for the source's version → copy → check it; a holder only waits
    group.enter()                       entry barrier; then this slot's version is invalid until the chunk ends
    k times, by a CUDA graph:
        group.local_latents()           own rows out of the slot
        for each layer: attend(…)       norm, rotate and push q, k, v → barrier A → attention → push output → barrier B
        group.share_latents(latents)    push latents → latents barrier
    group.finish()                      the slot gets its version

Members, ranges, slot and versions are words in device memory and peers' slabs are reached through `bases`, so one graph
serves every set of members, every slot and every step of its shape. A graph of a group that is not bound *rehearses*:
every member is this device and has no tokens, so it signals nobody and touches no slot. That is how kernels are warmed
up and graphs captured, at any degree, while other devices work.

Why no region is overwritten while somebody still reads it: exchange.py's argument, with "after" meaning stream order on
each device and the barrier's release and acquire between devices. Two things differ. A host does not wait, so an abort
does not stop it: `status` makes all further barriers return at once and empties the group's table, so that nothing more
is pushed, and nothing is published. And versions are written by kernels; the host learns the outcome from a copy
of `status` behind the chunk.

Uneven splits are padded: a shape's local text has ceil(T / n) rows and its local image ceil(N / n), whatever the rank;
a member's own rows come first in each, the others hold left-overs that nobody reads.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tetrion.engine.parallel.barrier import Aborted
from tetrion.engine.parallel.device_slab import DeviceSlabs
from tetrion.engine.parallel.exchange import Rope, Stream
from tetrion.engine.parallel.group import GroupPlan, plan_group, split
from tetrion.engine.parallel.word_upload import WordUpload
from tetrion.kernels.attention_backend import attend
from tetrion.kernels.barrier import ABORTED, barrier
from tetrion.kernels.chunk_words import NUM_CHUNK_WORDS, chunk_words
from tetrion.kernels.group_table import group_words, num_words
from tetrion.kernels.latents_push import Place, latents_push, latents_read
from tetrion.kernels.output_push import output_push
from tetrion.kernels.qk_norm_rope_push import qk_norm_rope_push
from tetrion.kernels.slot_version import NUM_STATUS_WORDS, WRONG_VERSION, SlotVersions
from tetrion.kernels.state_pull import Piece, state_pull


class GroupShape(NamedTuple):
    """All that a captured step depends on. `own_heads` varies by rank only where heads do not divide by the degree."""

    num_text: int
    num_image: int
    degree: int
    own_heads: int

    @property
    def padded_text(self) -> int:
        return -(-self.num_text // self.degree)

    @property
    def padded_image(self) -> int:
        return -(-self.num_image // self.degree)

    @property
    def num_local(self) -> int:
        """Rows of this member's hidden states, padding included: text, then image."""
        return self.padded_text + self.padded_image

    @property
    def num_tokens(self) -> int:
        return self.num_text + self.num_image


class PushedQkv(NamedTuple):
    """Slabs' addresses by device, the three regions' offsets in bytes, and this device's own: [tokens, heads, D]."""

    bases: Tensor
    offsets: tuple[int, int, int]
    regions: tuple[Tensor, Tensor, Tensor]


def group_shape(plan: GroupPlan, device_id: int) -> GroupShape:
    own_heads = len(plan.shard_of(device_id).heads)
    return GroupShape(plan.num_text, plan.num_image, plan.degree, own_heads)


def raise_for_status(status: Sequence[int]) -> None:
    """`status`: `DeviceExchange.status` after a chunk. Raises Aborted or RuntimeError unless all went well."""
    broken, outcome = status
    if WRONG_VERSION in (broken, outcome):
        raise RuntimeError("the slot that state was pulled from was already further than the version wanted")
    if broken == ABORTED:
        raise Aborted("the engine aborted what was running")
    assert broken == outcome == 0, f"status {broken}, {outcome}"


class DeviceExchange:
    """One worker's end of all groups. Make groups only once all slabs are where they stay (see DeviceMemory)."""

    def __init__(
        self, slabs: DeviceSlabs, abort: Tensor, clear_abort: Callable[[], None], num_heads: int, head_dim: int
    ) -> None:
        """`abort`: this device's abort word as kernels see it, int32 [1]; `clear_abort` clears it."""
        layout, device = slabs.layout, slabs.device
        self.slabs, self.abort, self.num_heads, self.head_dim = slabs, abort, num_heads, head_dim
        self.status = torch.zeros(NUM_STATUS_WORDS, dtype=torch.int32, device=device)
        """See slot_version.py; for `raise_for_status` after a copy to the host."""
        self.expected = torch.zeros(layout.num_devices, dtype=torch.int32, device=device)
        max_tokens = layout.max_text_tokens + layout.max_image_tokens
        self._scratch = torch.zeros(3 * max_tokens * num_heads * head_dim, dtype=slabs.dtype, device=device)
        self._scratch_bases = torch.full_like(slabs.bases, self._scratch.data_ptr())
        self.upload = WordUpload(device, num_words(layout.num_devices) + NUM_CHUNK_WORDS)
        self._clear_abort = clear_abort
        self._groups: dict[GroupShape, DeviceGroup] = {}

    def group(self, shape: GroupShape) -> "DeviceGroup":
        """Made on first use, which allocates a little memory; not within a graph's capture."""
        if shape not in self._groups:
            self._groups[shape] = DeviceGroup(self, shape)
        return self._groups[shape]

    def alone(self, num_text: int, num_image: int) -> tuple[GroupPlan, "DeviceGroup"]:
        """The group of this device alone."""
        plan = plan_group((self.slabs.device_id,), num_text, num_image, self.num_heads)
        return plan, self.group(group_shape(plan, self.slabs.device_id))

    def publish(self, slot: int, version: int) -> None:
        """Enqueue, behind the writes of a request's first state: this device's slot holds `version`."""
        plan, group = self.alone(0, 1)
        group.bind(plan, slot, source=self.slabs.device_id, start_version=0, end_version=version)
        group.pull_state()
        group.finish()

    def qkv(self, shape: GroupShape) -> "PushedQkv":
        """Where q, k, v of a group go. One device alone has room for all heads in scratch memory of its own GPU."""
        slabs, layout = self.slabs, self.slabs.layout
        if shape.degree > 1:
            regions = slabs.qkv(slabs.device_id, shape.num_tokens, shape.own_heads, self.head_dim)
            return PushedQkv(slabs.bases, (layout.q_offset, layout.k_offset, layout.v_offset), regions)
        size = len(self._scratch) // 3
        region = (shape.num_tokens, shape.own_heads, self.head_dim)
        q, k, v = (part[: torch.Size(region).numel()].view(region) for part in self._scratch.view(3, size))
        num_bytes = size * self._scratch.element_size()
        return PushedQkv(self._scratch_bases, (0, num_bytes, 2 * num_bytes), (q, k, v))

    def reset(self) -> None:
        """Forget all barriers and the abort. Waits for the device. On every device while all are idle."""
        self._synchronize()
        for words in (self.slabs.counters(), self.expected, self.status):
            words.zero_()
        self._synchronize()
        self._clear_abort()

    def warm_up(self, degrees: Iterable[int]) -> None:
        """Load the kernels around a chunk's steps: loading one while a peer waits for this device could take long.

        Those of a step depend on its shape and are loaded when it is first rehearsed.
        """
        for degree in degrees:
            group = self.group(GroupShape(0, degree, degree, -(-self.num_heads // degree)))
            group.rehearse()
            group.pull_pooled()
            group.pull_state()
            group.enter()
            group.finish()
        self._synchronize()

    def _synchronize(self) -> None:
        if self.slabs.device.type == "cuda":
            torch.cuda.synchronize(self.slabs.device)


class DeviceGroup:
    """What all groups of one shape share on this device: words, views, buffers. See the module's docstring."""

    def __init__(self, exchange: DeviceExchange, shape: GroupShape) -> None:
        slabs, layout = exchange.slabs, exchange.slabs.layout
        assert shape.num_text <= layout.max_text_tokens, f"{shape.num_text} of {layout.max_text_tokens} text tokens"
        assert shape.num_image <= layout.max_image_tokens, f"{shape.num_image} of {layout.max_image_tokens} tokens"
        self.shape = shape
        self._exchange, self._layout, self._me = exchange, layout, slabs.device_id
        self._words = torch.zeros(num_words(shape.degree) + NUM_CHUNK_WORDS, dtype=torch.int32, device=slabs.device)
        self._table, self._chunk = self._words.split([num_words(shape.degree), NUM_CHUNK_WORDS])
        self._versions = SlotVersions(
            self._table, self._chunk, slabs.bases, exchange.abort, exchange.status, layout.versions_offset
        )
        self._pushed = exchange.qkv(shape)
        self._latents = torch.zeros(shape.padded_image, layout.in_channels, dtype=torch.float32, device=slabs.device)
        if shape.degree > 1:
            self._output = slabs.output(self._me, shape.num_local, exchange.num_heads, exchange.head_dim).flatten(1)
        self.rehearse()

    # Around the steps of a chunk ---------------------------------------------------------------------------------

    def rehearse(self) -> None:
        """Enqueue: until the next `bind`, steps signal nobody and touch no slot."""
        degree, nothing = self.shape.degree, range(0)
        heads = split(self._exchange.num_heads, degree)
        words = group_words(0, (self._me,) * degree, (nothing,) * degree, (nothing,) * degree, heads)
        self._exchange.upload.copy([*words, *chunk_words(0, self._me, 0, 0)], self._words)

    def bind(self, plan: GroupPlan, slot: int, *, source: int, start_version: int, end_version: int) -> None:
        """Enqueue: what follows is a chunk of `plan`'s group on the state in `slot`.

        start_version: what the state must have before the first step, to be pulled from `source` (this device's own
        number: it is here); 0: whatever is here will do. end_version: what `finish` gives it; 0: none.
        """
        assert group_shape(plan, self._me) == self.shape, f"{plan} is not of {self.shape}"
        missing = {*plan.members, source} - set(self._exchange.slabs.mapped)
        assert not missing, f"slabs of devices {sorted(missing)} are not mapped"
        assert 0 <= slot < self._layout.num_slots, f"slot {slot} of {self._layout.num_slots}"
        shards = plan.shards
        ranges = [[getattr(shard, name) for shard in shards] for name in ("text", "image", "heads")]
        words = group_words(plan.shard_of(self._me).rank, plan.members, *ranges)
        self._exchange.upload.copy([*words, *chunk_words(slot, source, start_version, end_version)], self._words)

    def pull_pooled(self) -> None:
        """Enqueue, before `pull_state`: copy the pooled embedding as soon as the source has the request at all, be it
        in the midst of a chunk. It never changes, and a newcomer can compute from it while the others are at work."""
        self._versions.wait_for_state()
        layout = self._layout
        self._pull((0, 0), (layout.pooled_in_slot, layout.pooled_dim * layout.itemsize), (layout.latents_in_slot, 0))

    def pull_state(self) -> None:
        """Enqueue: wait until the source has the start version, copy its state here, and check that it still has it."""
        self._versions.wait()
        layout, shape = self._layout, self.shape
        self._pull(
            (0, shape.num_text * layout.text_dim * layout.itemsize),
            (layout.pooled_in_slot, layout.pooled_dim * layout.itemsize),
            (layout.latents_in_slot, shape.num_image * layout.in_channels * self._latents.element_size()),
        )
        self._versions.confirm(in_group=shape.degree > 1)

    def _pull(self, *pieces: *tuple[Piece, Piece, Piece]) -> None:
        exchange, layout = self._exchange, self._layout
        state_pull(
            self._table,
            self._chunk,
            exchange.slabs.bases,
            exchange.status,
            pieces,
            slots_offset=layout.slots_offset,
            slot_bytes=layout.slot_bytes,
        )

    def enter(self) -> None:
        """Enqueue: wait for all members; from here on the slot's latents change."""
        self._wait_for_all()
        self._versions.invalidate(degree=self.shape.degree)

    def finish(self) -> None:
        """Enqueue, after the last step: the slot has its end version, unless something went wrong."""
        self._versions.publish()

    # Within a step; may be captured ------------------------------------------------------------------------------

    def local_latents(self) -> Tensor:
        """This member's latents before the step: fp32 [padded_image, C]; rows of padding are 0. One buffer for all."""
        latents_read(self._latents, *self._slots())
        return self._latents

    def attend(self, streams: Sequence[Stream], rope: Rope) -> Tensor:
        """Attention of the local tokens over the whole sequence, after q/k RMSNorm and rotary embedding.

        streams: padded local text and padded local image (double blocks), or both in one (single blocks).
        rope: of the whole sequence in canonical order, [tokens, D / 2], fp32, one value a pair.
        Returns [num_local, H · D], text first, in the same padded order, valid until the next call.
        """
        exchange, shape = self._exchange, self.shape
        qk_norm_rope_push(
            *self._both(streams),
            rope,
            self._table,
            self._pushed.bases,
            self._pushed.offsets,
            degree=shape.degree,
            num_heads=exchange.num_heads,
        )
        self._wait_for_all()
        output = attend(*self._pushed.regions)
        if shape.degree == 1:
            return output.flatten(1)
        output_push(
            output,
            self._table,
            exchange.slabs.bases,
            self._layout.output_offset,
            degree=shape.degree,
            num_heads=exchange.num_heads,
            num_text=shape.num_text,
            image_row=shape.padded_text,
        )
        self._wait_for_all()
        return self._output

    def share_latents(self, latents: Tensor) -> None:
        """Give every member this one's new latents, fp32 [padded_image, C]."""
        assert latents.shape == self._latents.shape, f"{tuple(latents.shape)}, not {tuple(self._latents.shape)}"
        latents_push(latents, *self._slots())
        self._wait_for_all()

    def _both(self, streams: Sequence[Stream]) -> tuple[Stream, Stream]:
        """Text and image apart."""
        if len(streams) == 1:
            (stream,) = streams
            assert len(stream.qkv) == self.shape.num_local, f"{len(stream.qkv)} rows, not {self.shape.num_local}"
            text, image = stream.qkv.split([self.shape.padded_text, self.shape.padded_image])
            return stream._replace(qkv=text), stream._replace(qkv=image)
        first, second = streams
        rows = len(first.qkv), len(second.qkv)
        assert rows == (self.shape.padded_text, self.shape.padded_image), f"{rows} rows for {self.shape}"
        return first, second

    def _wait_for_all(self) -> None:
        if self.shape.degree > 1:
            exchange = self._exchange
            barrier(
                self._table,
                exchange.slabs.bases,
                exchange.expected,
                exchange.abort,
                exchange.status,
                degree=self.shape.degree,
                counters_offset=self._layout.counters_offset,
            )

    def _slots(self) -> tuple[Tensor, Tensor, Tensor, Place]:
        layout = self._layout
        place = Place(layout.latents_offset(0), layout.slot_bytes, self.shape.degree)
        return self._table, self._chunk, self._exchange.slabs.bases, place
