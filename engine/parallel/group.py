"""The arithmetic of sequence parallelism as values: who holds which rows and heads, who evaluates which branch.

No torch, no processes. A group is an ordered tuple of device ids; position = rank. A sequence is consecutive *segments*
(text, image, reference; their order is the family's). Each segment and the heads are split over the ranks as evenly as
possible, in order. *Canonical order* of a whole sequence is segment by segment; a member's own *local* order is its
rows of each segment, in the same order.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec


class Shard(msgspec.Struct, frozen=True, kw_only=True):
    """What one member holds: of each segment a range of its rows, and a range of heads. `key_heads`: of keys and
    values, where several heads of queries share one."""

    device_id: int
    rank: int
    rows: tuple[range, ...]
    heads: range
    key_heads: range

    @property
    def num_rows(self) -> int:
        return sum(len(part) for part in self.rows)


class GroupShape(NamedTuple):
    """All that one pass over a sequence depends on, on one member. `counts`: rows of each segment.

    Uneven splits are padded: a member's local rows of a segment are ⌈count / degree⌉ whatever its rank, its own first.
    `own_heads` varies by rank only where heads do not divide by the degree.
    """

    counts: tuple[int, ...]
    degree: int
    own_heads: int

    @property
    def padded(self) -> tuple[int, ...]:
        """Local rows of each segment, padding included."""
        return tuple(-(-count // self.degree) for count in self.counts)

    @property
    def num_tokens(self) -> int:
        """Rows of the whole sequence."""
        return sum(self.counts)

    def num_prefix(self, stepped: int) -> int:
        """Rows beside those of one segment."""
        return self.num_tokens - self.counts[stepped]

    @property
    def num_local(self) -> int:
        """Rows of this member's hidden states, padding included."""
        return sum(self.padded)


class GroupPlan(msgspec.Struct, frozen=True, kw_only=True):
    """All members' shards, by rank. `counts`: rows of each segment."""

    counts: tuple[int, ...]
    num_heads: int
    shards: tuple[Shard, ...]

    @property
    def degree(self) -> int:
        return len(self.shards)

    @property
    def members(self) -> tuple[int, ...]:
        return tuple(shard.device_id for shard in self.shards)

    def shard_of(self, device_id: int) -> Shard:
        assert device_id in self.members, f"device {device_id} is not in group {self.members}"
        return self.shards[self.members.index(device_id)]

    def shape_of(self, device_id: int) -> GroupShape:
        return GroupShape(self.counts, self.degree, len(self.shard_of(device_id).heads))

    def canonical_rows(self, shard: Shard) -> tuple[range, ...]:
        """Rows of the shard's part of each segment in canonical order."""
        starts = first_rows(self.counts)
        return tuple(range(s + part.start, s + part.stop) for s, part in zip(starts, shard.rows, strict=True))


class BranchLayout(msgspec.Struct, frozen=True, kw_only=True):
    """Who evaluates which guidance branch of a step.

    *Apart*, if the number of members divides by that of branches: branch b on the b-th part of the group; members of
    equal rank in their parts hold the same rows of the image and tell each other their velocities. Else *in turn*: the
    whole group is one part, which evaluates all branches one after the other. Both give the same bits.
    """

    members: tuple[int, ...]
    num_branches: int = 1

    @property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """The members of each part, by rank."""
        num_parts = self.num_branches if len(self.members) % self.num_branches == 0 else 1
        size = len(self.members) // num_parts
        return tuple(self.members[i : i + size] for i in range(0, len(self.members), size))

    def part_of(self, device_id: int) -> tuple[int, ...]:
        return self.parts[self._index(device_id)]

    def branches_of(self, device_id: int) -> tuple[int, ...]:
        """What the device's part evaluates, in this order."""
        return tuple(range(self.num_branches)) if len(self.parts) == 1 else (self._index(device_id),)

    def partners_of(self, device_id: int) -> tuple[int, ...]:
        """The devices that hold the same rows of the image, by part, itself among them."""
        rank = self.part_of(device_id).index(device_id)
        return tuple(part[rank] for part in self.parts)

    def _index(self, device_id: int) -> int:
        assert device_id in self.members, f"device {device_id} is not in group {self.members}"
        return next(i for i, part in enumerate(self.parts) if device_id in part)


def split(count: int, parts: int) -> tuple[range, ...]:
    """`count` things in `parts` consecutive ranges; the first `count % parts` have one more than the rest."""
    assert parts >= 1 and count >= 0, f"cannot split {count} in {parts} parts"
    size, longer = divmod(count, parts)
    starts = [rank * size + min(rank, longer) for rank in range(parts + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(starts))


def split_heads(num_heads: int, heads_per_key: int, parts: int) -> tuple[range, ...]:
    """Heads of queries, so that all that share a head of keys and values are in one part."""
    assert num_heads % heads_per_key == 0, f"{num_heads} heads of which {heads_per_key} share a key"
    keys = split(num_heads // heads_per_key, parts)
    return tuple(range(part.start * heads_per_key, part.stop * heads_per_key) for part in keys)


def first_rows(counts: Sequence[int]) -> tuple[int, ...]:
    """Where each of consecutive segments of `counts` rows begins."""
    return tuple(sum(counts[:i]) for i in range(len(counts)))


def plan_group(members: tuple[int, ...], counts: Sequence[int], num_heads: int, heads_per_key: int = 1) -> GroupPlan:
    """`heads_per_key`: so many heads of queries share one of keys and values, and are not parted from it. Raises
    ValueError if some member would get no head, or no row of the longest segment."""
    assert members and len(set(members)) == len(members), f"members {members} must be distinct"
    degree = len(members)
    if degree > num_heads // heads_per_key:
        raise ValueError(f"degree {degree} is more than the model's {num_heads // heads_per_key} heads")
    if degree > max(counts):
        raise ValueError(f"degree {degree} is more than the longest segment's {max(counts)} rows")
    rows = list(zip(*(split(count, degree) for count in counts), strict=True))
    return GroupPlan(
        counts=tuple(counts),
        num_heads=num_heads,
        shards=tuple(
            Shard(device_id=device_id, rank=rank, rows=rows[rank], heads=heads, key_heads=key_heads)
            for rank, (device_id, heads, key_heads) in enumerate(
                zip(
                    members,
                    split_heads(num_heads, heads_per_key, degree),
                    split(num_heads // heads_per_key, degree),
                    strict=True,
                )
            )
        ),
    )
