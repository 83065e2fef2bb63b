"""What the members of a sequence-parallel group tell each other: attention's heads, new latents, a request's state.

Owns the order of pushes and barriers, and the reasons why it is safe; knows no model and no commands. Ulysses
(arXiv:2309.14509): each member projects its own tokens, attends over all tokens for its own heads.
The exchanges here are those of CPU workers; device_exchange.py enqueues the same on a GPU.

A chunk of steps on one member, in this order:

    pull_state(source, slot, version)       a newcomer only
    enter(slot)                             entry barrier; then this slot's version is invalid until the chunk ends
    for each step:
        for each layer:  attend(...)        push q, k, v → barrier A → attention → push output → barrier B
        share_latents(latents, slot, …)     push latents → latents barrier; after the last step the slot gets a version

Why no region is overwritten while somebody still reads it. P is the writer, R the owner and reader:

* q, k, v of R. R reads them between A and B of a layer. P writes the next layer's only after it has passed B, hence
  after R has arrived at B, hence after R has read.
* output of R. R reads it from B on until it calls `attend` again (so that the result needs no copy). P writes the next
  layer's only after it has passed the next A, hence after R has called `attend` again and pushed.
* latents in R's slot, P's rows. R reads them at the beginning of a step, before its first A. P writes them after its
  last B. R's own rows only R writes.
* Across groups. R arrives at the entry barrier of a group after it has finished its previous chunk, whose last barrier
  every member of that group passed into after its last push. So no member of the new group pushes while R still reads,
  and nobody from the old group pushes any more. Degree 1 pushes to nobody.
* A pull. The source keeps its slot as it is until the puller is done: if it is a member of the puller's group, it
  stands at the entry barrier until then; if not, it does not touch the request again before it pulls in its turn,
  from a group that could not have started before this pull was done. The version is invalid from entry to the chunk's
  end, so a pull can never see latents of two steps, nor those of a chunk that was aborted half-way.
So two barriers a layer suffice, with one at entry and one a step for the latents. After an abort none of this holds:
see barrier.py about the reset.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tetrion.engine.parallel.barrier import PairwiseBarrier
from tetrion.engine.parallel.group import GroupPlan, Shard, plan_group
from tetrion.engine.parallel.shared_slab import SharedSlabs
from tetrion.engine.parallel.words import INVALID_VERSION
from tetrion.kernels.reference import attention, qk_norm_rope

Rope = tuple[Tensor, Tensor]
"""cos, sin of the local tokens (text first), [num_local, head_dim] each."""


class Stream(NamedTuple):
    """Consecutive local tokens with one set of weights. `qkv`: [n, 3, H, D] or [n, 3 * H * D]; norms: [D]."""

    qkv: Tensor
    q_norm: Tensor
    k_norm: Tensor


class Exchange(Protocol):
    """One member's side of a group, for one chunk. See the module's docstring for the order of calls.

    All waits raise Aborted when the engine gives the group up.
    """

    shard: Shard

    @property
    def degree(self) -> int: ...

    @property
    def rank(self) -> int: ...

    def pull_state(self, source: int, slot: int, version: int) -> None:
        """Wait until `slot` on device `source` has `version`, then copy its state into this device's slot."""

    def enter(self, slot: int) -> None:
        """Wait for all members; from here on the slot's latents change."""

    def attend(self, streams: Sequence[Stream], rope: Rope) -> Tensor:
        """Attention of the local tokens over the whole sequence, after q/k RMSNorm and rotary embedding.

        `streams`: local text and local image (double blocks), or both in one (single blocks). Returns
        [num_local, H * D], text first, valid until the next call.
        """

    def share_latents(self, latents: Tensor, slot: int, version: int | None = None) -> None:
        """Give every member this one's new latents [num_local_image, C]. `version`: after a chunk's last step."""


class LocalExchange:
    """Degree 1: nobody to talk to. Nothing is copied but latents into their slot."""

    degree = 1
    rank = 0

    def __init__(self, slabs: SharedSlabs, barrier: PairwiseBarrier, plan: GroupPlan) -> None:
        assert plan.members == (slabs.device_id,), f"group {plan.members} is not device {slabs.device_id} alone"
        self._slabs, self._barrier, self._plan = slabs, barrier, plan
        self.shard = plan.shards[0]

    def pull_state(self, source: int, slot: int, version: int) -> None:
        pull_state(self._slabs, self._barrier, self._plan, source, slot, version)

    def enter(self, slot: int) -> None:
        self._barrier.check_abort()
        self._slabs.slot(self._slabs.device_id, slot).version = INVALID_VERSION

    def attend(self, streams: Sequence[Stream], rope: Rope) -> Tensor:
        pieces = normed(streams, rope, self._plan.num_heads)
        q, k, v = pieces[0] if len(pieces) == 1 else (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return attention(q, k, v).flatten(1)

    def share_latents(self, latents: Tensor, slot: int, version: int | None = None) -> None:
        state = self._slabs.slot(self._slabs.device_id, slot)
        state.latents[: self._plan.num_image].copy_(latents)
        self._barrier.check_abort()
        if version is not None:
            state.version = version


class SharedExchange:
    """Degree 2 and up over shared slabs. All views are made here, once a chunk."""

    def __init__(self, slabs: SharedSlabs, barrier: PairwiseBarrier, plan: GroupPlan, head_dim: int) -> None:
        assert plan.degree > 1, "one device alone exchanges nothing"
        self._slabs, self._barrier, self._plan = slabs, barrier, plan
        self.shard = shard = plan.shard_of(slabs.device_id)
        self._text, self._image = (slice(r.start, r.stop) for r in plan.canonical_rows(shard))
        self._peers = [_Peer(slabs, plan, peer, head_dim) for peer in in_push_order(plan, shard)]
        self._qkv = slabs.qkv(shard.device_id, plan.num_tokens, len(shard.heads), head_dim)
        self._output = slabs.output(shard.device_id, shard.num_tokens, plan.num_heads, head_dim).flatten(1)

    @property
    def degree(self) -> int:
        return self._plan.degree

    @property
    def rank(self) -> int:
        return self.shard.rank

    def pull_state(self, source: int, slot: int, version: int) -> None:
        pull_state(self._slabs, self._barrier, self._plan, source, slot, version)

    def enter(self, slot: int) -> None:
        self._wait_for_all()
        self._slabs.slot(self.shard.device_id, slot).version = INVALID_VERSION

    def attend(self, streams: Sequence[Stream], rope: Rope) -> Tensor:
        self._push_qkv(normed(streams, rope, self._plan.num_heads))
        self._wait_for_all()
        self._push_output(attention(*self._qkv))
        self._wait_for_all()
        return self._output

    def share_latents(self, latents: Tensor, slot: int, version: int | None = None) -> None:
        rows = slice(self.shard.image.start, self.shard.image.stop)
        for peer in self._peers:
            self._slabs.slot(peer.shard.device_id, slot).latents[rows].copy_(latents)
        self._wait_for_all()
        if version is not None:
            self._slabs.slot(self.shard.device_id, slot).version = version

    def _push_qkv(self, pieces: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        num_text = len(self.shard.text)
        if len(pieces) == 1:
            text = tuple(part[:num_text] for part in pieces[0])
            image = tuple(part[num_text:] for part in pieces[0])
        else:
            text, image = pieces
        for peer in self._peers:
            for region, text_part, image_part in zip(peer.qkv, text, image, strict=True):
                region[self._text].copy_(text_part[:, peer.heads])
                region[self._image].copy_(image_part[:, peer.heads])

    def _push_output(self, output: Tensor) -> None:
        """`output`: [all tokens, own heads, D]."""
        own_heads = slice(self.shard.heads.start, self.shard.heads.stop)
        for peer in self._peers:
            num_text = len(peer.shard.text)
            peer.output[:num_text, own_heads].copy_(output[peer.text])
            peer.output[num_text:, own_heads].copy_(output[peer.image])

    def _wait_for_all(self) -> None:
        self._barrier.arrive_and_wait(self._plan.members)


class _Peer:
    """A member as the others see it (every member is its own peer too): where to push what."""

    def __init__(self, slabs: SharedSlabs, plan: GroupPlan, shard: Shard, head_dim: int) -> None:
        self.shard = shard
        self.heads = slice(shard.heads.start, shard.heads.stop)
        self.text, self.image = (slice(r.start, r.stop) for r in plan.canonical_rows(shard))
        self.qkv = slabs.qkv(shard.device_id, plan.num_tokens, len(shard.heads), head_dim)
        self.output = slabs.output(shard.device_id, shard.num_tokens, plan.num_heads, head_dim)


def make_exchange(
    slabs: SharedSlabs,
    barrier: PairwiseBarrier,
    members: tuple[int, ...],
    num_text: int,
    num_image: int,
    num_heads: int,
    head_dim: int,
) -> Exchange:
    """The exchange of this device in `members`. Raises ValueError if the group is too large (see `plan_group`)."""
    plan = plan_group(members, num_text, num_image, num_heads)
    layout = slabs.layout
    assert num_text <= layout.max_text_tokens, f"{num_text} text tokens, at most {layout.max_text_tokens} fit"
    assert num_image <= layout.max_image_tokens, f"{num_image} image tokens, at most {layout.max_image_tokens} fit"
    if plan.degree == 1:
        return LocalExchange(slabs, barrier, plan)
    return SharedExchange(slabs, barrier, plan, head_dim)


def normed(streams: Sequence[Stream], rope: Rope, num_heads: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k, v of each stream, [n, H, D] each; `rope` holds the rows of all streams in their order."""
    cos, sin = rope
    rows = [len(stream.qkv) for stream in streams]
    assert 1 <= len(streams) <= 2 and sum(rows) == len(cos), f"streams of {rows} tokens, rope of {len(cos)}"
    parts = []
    for stream, cos_part, sin_part in zip(streams, cos.split(rows), sin.split(rows), strict=True):
        if len(stream.qkv):
            parts.append(qk_norm_rope(*stream, cos_part, sin_part))
        else:  # a member without text tokens
            nothing = stream.qkv.new_empty(0, num_heads, cos.shape[1])
            parts.append((nothing, nothing, nothing))
    return parts


def in_push_order(plan: GroupPlan, own: Shard) -> tuple[Shard, ...]:
    """All members, starting with oneself, so that not everybody writes into the same slab at once."""
    return plan.shards[own.rank :] + plan.shards[: own.rank]


def pull_state(
    slabs: SharedSlabs, barrier: PairwiseBarrier, plan: GroupPlan, source: int, slot: int, version: int
) -> None:
    """Copy a request's state from `source`'s slot to the same slot here, which then has `version` too.

    If that is this device's own slot, only wait. The version is checked after copying, so that a slot which changed
    meanwhile is noticed.

    Raises Aborted, or RuntimeError if the source is already further than `version`.
    """
    barrier.wait_version(source, slot, version)
    theirs, ours = slabs.slot(source, slot), slabs.slot(slabs.device_id, slot)
    if source != slabs.device_id:
        ours.version = INVALID_VERSION
        ours.text[: plan.num_text].copy_(theirs.text[: plan.num_text])
        ours.pooled.copy_(theirs.pooled)
        ours.latents[: plan.num_image].copy_(theirs.latents[: plan.num_image])
    if (found := theirs.version) != version:
        raise RuntimeError(f"slot {slot} on device {source} has version {found:#x}, wanted {version:#x}")
    if source != slabs.device_id:
        ours.version = version
