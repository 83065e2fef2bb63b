"""Several devices' slabs in one process, laid out and filled as the engine's groups would."""

import torch
from torch import Tensor

from tests.engine.specs import make_spec
from tetrion.engine.parallel.group import GroupPlan, plan_group
from tetrion.engine.parallel.layout import slab_layout
from tetrion.kernels.group_table import group_words

POISON = 0xFF  # a NaN in every dtype used here


class GroupSlabs:
    """`slabs[d]`: bytes of device d's slab, poisoned; `bases`: their addresses."""

    def __init__(self, plan: GroupPlan, head_dim: int, dtype: torch.dtype) -> None:
        self.plan, self.head_dim, self.dtype = plan, head_dim, dtype
        spec = make_spec(
            num_heads=plan.num_heads,
            head_dim=head_dim,
            max_text_tokens=max(plan.num_text, 1),
            max_size=128,
            default_size=(128, 128),
        )
        num_devices = max(max(plan.members) + 1, 2)
        self.layout = slab_layout(spec, num_devices, 1, dtype.itemsize)
        # A group of one writes regions of all heads, which the layout of shared slabs has no room for: twice the bytes.
        size = self.layout.num_bytes + 4 * self.layout.exchange_bytes
        self.slabs = [torch.full((size,), POISON, dtype=torch.uint8) for _ in range(num_devices)]
        self.bases = torch.tensor([slab.data_ptr() for slab in self.slabs], dtype=torch.int64)
        step = self.layout.exchange_bytes * (2 if plan.degree == 1 else 1)
        first = self.layout.q_offset
        self.offsets = (first, first + step, first + 2 * step)
        self.output_offset = first + 3 * step

    def table(self, rank: int) -> Tensor:
        shards = self.plan.shards
        ranges = [[getattr(shard, name) for shard in shards] for name in ("text", "image", "heads")]
        return torch.tensor(group_words(rank, self.plan.members, *ranges), dtype=torch.int32)

    def take_qkv(self, rank: int) -> list[Tensor]:
        """Copies of the member's q, k, v regions, [all tokens, own heads, D]; the regions are poisoned again."""
        shard = self.plan.shards[rank]
        shape = (self.plan.num_tokens, len(shard.heads), self.head_dim)
        return [self._take(shard.device_id, offset, shape) for offset in self.offsets]

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


def make_plan(members: tuple[int, ...], num_text: int, num_image: int, num_heads: int) -> GroupPlan:
    return plan_group(members, num_text, num_image, num_heads)
