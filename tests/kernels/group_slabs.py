"""Several devices' slabs in one process, laid out and filled as the engine's groups would."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tetrion.engine.parallel.group import GroupPlan, Shard
from tetrion.kernels.chunk_words import chunk_words, lanes_for
from tetrion.kernels.group_table import group_words
from tetrion.kernels.slot_version import NUM_STATUS_WORDS

POISON = 0xFF  # a NaN in every dtype used here
PAGE = 4096


class GroupSlabs:
    """`slabs[d]`: bytes of device d's slab [q | k | v | output], poisoned; `bases`: their addresses."""

    def __init__(self, plan: GroupPlan, head_dim: int, dtype: torch.dtype) -> None:
        self.plan, self.head_dim, self.dtype = plan, head_dim, dtype
        num_devices = max(plan.members) + 1
        num_rows = sum(plan.counts) + plan.degree * len(plan.counts)
        region = -(-num_rows * plan.num_heads * head_dim * dtype.itemsize // PAGE) * PAGE
        self.slabs = [torch.full((4 * region,), POISON, dtype=torch.uint8) for _ in range(num_devices)]
        self.bases = torch.tensor([slab.data_ptr() for slab in self.slabs], dtype=torch.int64)
        self.offsets, self.output_offset = (0, region, 2 * region), 3 * region
        heads = [shard.heads for shard in plan.shards]
        segments = [[shard.rows[s] for shard in plan.shards] for s in range(len(plan.counts))]
        self.table = torch.tensor(group_words(segments, heads), dtype=torch.int32)
        self.status = torch.zeros(NUM_STATUS_WORDS, dtype=torch.int32)

    def words(self, rank: int) -> Tensor:
        me, part = self.plan.members[rank], self.plan.members
        lanes = lanes_for(max(part) + 1)
        who = {"part": part, "rows": range(0), "everyone": part, "partners": (me,)}
        state = {"slot": 0, "source": me, "start_version": 0, "end_version": 0, "start_buffer": 0, "end_buffer": 1}
        words = chunk_words(me, lanes, **state, **who)
        return torch.tensor(words, dtype=torch.int32)

    def take_qkv(self, rank: int, over: Sequence[int]) -> list[Tensor]:
        """Copies of the member's q, k, v regions, [all rows of those segments, own heads, D]; poisoned again."""
        shard, num_rows = self.plan.shards[rank], sum(self.plan.counts[s] for s in over)
        heads = len(shard.heads), len(shard.key_heads), len(shard.key_heads)
        return [
            self._take(shard.device_id, offset, (num_rows, count, self.head_dim))
            for offset, count in zip(self.offsets, heads, strict=True)
        ]

    def take_output(self, rank: int, num_rows: int) -> Tensor:
        """A copy of the member's output region, [num_rows, H, D]; the region is poisoned again."""
        shape = (num_rows, self.plan.num_heads, self.head_dim)
        return self._take(self.plan.shards[rank].device_id, self.output_offset, shape)

    def assert_untouched(self) -> None:
        """Whatever was not taken still holds the poison."""
        for device, slab in enumerate(self.slabs):
            assert (slab == POISON).all(), f"device {device}: a store beside the regions"

    def _take(self, device: int, offset: int, shape: tuple[int, ...]) -> Tensor:
        num_bytes = torch.Size(shape).numel() * self.dtype.itemsize
        part = self.slabs[device][offset : offset + num_bytes]
        taken = part.clone().view(self.dtype).view(shape)
        part.fill_(POISON)
        return taken


def rows_in(plan: GroupPlan, shard: Shard, over: Sequence[int]) -> list[slice]:
    """The shard's rows of each of `over`, in canonical order of those segments alone."""
    slices, first = [], 0
    for segment in over:
        rows = shard.rows[segment]
        slices.append(slice(first + rows.start, first + rows.stop))
        first += plan.counts[segment]
    return slices
