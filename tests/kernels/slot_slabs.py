"""Several devices' slabs with state slots in one process, poisoned, and the words of a chunk."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.engine.specs import make_spec
from tetrion.engine.parallel.group import plan_group
from tetrion.engine.parallel.layout import slab_layout
from tetrion.kernels.chunk_words import chunk_words
from tetrion.kernels.group_table import group_words
from tetrion.kernels.slot_version import NUM_STATUS_WORDS, SlotVersions

NUM_DEVICES, NUM_SLOTS = 4, 3
NUM_TEXT, NUM_IMAGE, NUM_HEADS = 7, 45, 6
POISON = 0x7F
SPEC = make_spec(num_heads=NUM_HEADS, max_text_tokens=9, text_dim=20, max_size=128, default_size=(128, 128))


class SlotSlabs:
    def __init__(self) -> None:
        self.layout = slab_layout(SPEC, NUM_DEVICES, NUM_SLOTS, itemsize=2)
        self.slabs = [torch.full((self.layout.num_bytes,), POISON, dtype=torch.uint8) for _ in range(NUM_DEVICES)]
        self.bases = torch.tensor([slab.data_ptr() for slab in self.slabs], dtype=torch.int64)
        for device in range(NUM_DEVICES):
            for slot in range(NUM_SLOTS):
                self.version(device, slot).fill_(0)
        self.status = torch.zeros(NUM_STATUS_WORDS, dtype=torch.int32)
        abort = torch.zeros(1, dtype=torch.int32, device="cpu")
        self.abort = abort.pin_memory() if self.bases.device.type == "cuda" else abort

    def version(self, device: int, slot: int) -> Tensor:
        start = self.layout.version_offset(slot)
        return self.slabs[device][start : start + 8].view(torch.int64)

    def state_word(self, device: int, slot: int) -> Tensor:
        """Whose state the slot holds, whatever its version."""
        start = self.layout.version_offset(slot) + 16
        return self.slabs[device][start : start + 8].view(torch.int64)

    def latents(self, device: int, slot: int) -> Tensor:
        """All rows of the slot: fp32 [max_image_tokens, C]."""
        start, stop = self.layout.latents_offset(slot), self.layout.slots_offset + (slot + 1) * self.layout.slot_bytes
        size = 4 * self.layout.max_image_tokens * self.layout.in_channels
        assert start + size <= stop
        return self.slabs[device][start : start + size].view(torch.float32).view(-1, self.layout.in_channels)

    def table(self, members: Sequence[int], me: int) -> Tensor:
        plan = plan_group(tuple(members), NUM_TEXT, NUM_IMAGE, NUM_HEADS)
        ranges = [[getattr(shard, name) for shard in plan.shards] for name in ("text", "image", "heads")]
        return torch.tensor(group_words(plan.shard_of(me).rank, plan.members, *ranges), dtype=torch.int32)

    def versions(self, table: Tensor, chunk: Tensor) -> SlotVersions:
        return SlotVersions(table, chunk, self.bases, self.abort, self.status, self.layout.versions_offset)


def chunk(slot: int, source: int = 0, start_version: int = 0, end_version: int = 0) -> Tensor:
    return torch.tensor(chunk_words(slot, source, start_version, end_version), dtype=torch.int32)
