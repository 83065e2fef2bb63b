"""The arithmetic of sequence parallelism as values: who holds which tokens and heads. No torch, no processes.

A group is an ordered tuple of device ids; position = rank. Text tokens, image tokens and heads are each split over the
ranks as evenly as possible, in order. *Canonical order* of a whole sequence is all text, then all image; a member's own
*local* order is its text, then its image.
"""

from itertools import pairwise

import msgspec


class Shard(msgspec.Struct, frozen=True, kw_only=True):
    """What one member holds. `text` and `image` are ranges of token numbers in their own stream, `heads` of heads."""

    device_id: int
    rank: int
    text: range
    image: range
    heads: range

    @property
    def num_tokens(self) -> int:
        return len(self.text) + len(self.image)


class GroupPlan(msgspec.Struct, frozen=True, kw_only=True):
    """All members' shards, by rank."""

    num_text: int
    num_image: int
    num_heads: int
    shards: tuple[Shard, ...]

    @property
    def degree(self) -> int:
        return len(self.shards)

    @property
    def members(self) -> tuple[int, ...]:
        return tuple(shard.device_id for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        return self.num_text + self.num_image

    def shard_of(self, device_id: int) -> Shard:
        assert device_id in self.members, f"device {device_id} is not in group {self.members}"
        return self.shards[self.members.index(device_id)]

    def canonical_rows(self, shard: Shard) -> tuple[range, range]:
        """Rows of the shard's text and image tokens in canonical order."""
        return shard.text, range(self.num_text + shard.image.start, self.num_text + shard.image.stop)


def split(count: int, parts: int) -> tuple[range, ...]:
    """`count` things in `parts` consecutive ranges; the first `count % parts` have one more than the rest."""
    assert parts >= 1 and count >= 0, f"cannot split {count} in {parts} parts"
    size, longer = divmod(count, parts)
    starts = [rank * size + min(rank, longer) for rank in range(parts + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(starts))


def plan_group(members: tuple[int, ...], num_text: int, num_image: int, num_heads: int) -> GroupPlan:
    """Raises ValueError if some member would get no head or no image token. A member may get no text token."""
    assert members and len(set(members)) == len(members), f"members {members} must be distinct"
    degree = len(members)
    if degree > num_heads:
        raise ValueError(f"degree {degree} is more than the model's {num_heads} heads")
    if degree > num_image:
        raise ValueError(f"degree {degree} is more than the picture's {num_image} image tokens")
    splits = zip(members, split(num_text, degree), split(num_image, degree), split(num_heads, degree), strict=True)
    return GroupPlan(
        num_text=num_text,
        num_image=num_image,
        num_heads=num_heads,
        shards=tuple(
            Shard(device_id=device_id, rank=rank, text=text, image=image, heads=heads)
            for rank, (device_id, text, image, heads) in enumerate(splits)
        ),
    )


def shard(members: tuple[int, ...], device_id: int, num_text: int, num_image: int, num_heads: int) -> Shard:
    """The shard of `device_id` in the group `members`. Raises as `plan_group` does."""
    return plan_group(members, num_text, num_image, num_heads).shard_of(device_id)
