"""Several devices' slabs with state slots in one process, poisoned, and the words of a chunk."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.engine.specs import make_spec
from tetrion.engine.parallel.group import split
from tetrion.engine.parallel.layout import NUM_BUFFERS, slab_layout
from tetrion.kernels.chunk_words import chunk_words, lanes_for
from tetrion.kernels.slot_version import NUM_STATUS_WORDS, SlotVersions
from tetrion.kernels.state_place import Place

NUM_DEVICES, NUM_SLOTS = 4, 3
NUM_IMAGE, WIDTH = 45, 16
POISON = 0x7F
SPEC = make_spec(num_heads=6, max_text_tokens=9, max_size=128, default_size=(128, 128))


class SlotSlabs:
    def __init__(self) -> None:
        self.layout = slab_layout([SPEC], NUM_DEVICES, NUM_SLOTS, itemsize=2)
        self.slabs = [torch.full((self.layout.num_bytes,), POISON, dtype=torch.uint8) for _ in range(NUM_DEVICES)]
        self.bases = torch.tensor([slab.data_ptr() for slab in self.slabs], dtype=torch.int64)
        for device in range(NUM_DEVICES):
            for slot in range(NUM_SLOTS):
                for buffer in range(NUM_BUFFERS):
                    self.version(device, slot, buffer).fill_(0)
        self.status = torch.zeros(NUM_STATUS_WORDS, dtype=torch.int32)
        abort = torch.zeros(1, dtype=torch.int32, device="cpu")
        self.abort = abort.pin_memory() if self.bases.device.type == "cuda" else abort
        self.latents = self.layout.slots[SPEC.name].place("latents")

    @property
    def place(self) -> Place:
        return Place(self.layout.slot_offset(0) + self.latents.offset, self.layout.slot_bytes, self.latents.part_bytes)

    def version(self, device: int, slot: int, buffer: int) -> Tensor:
        start = self.layout.version_offset(slot) + 8 * buffer
        return self.slabs[device][start : start + 8].view(torch.int64)

    def versions_of(self, device: int, slot: int) -> list[int]:
        """Of all buffers."""
        return [int(self.version(device, slot, buffer)) for buffer in range(NUM_BUFFERS)]

    def slot(self, device: int, slot: int) -> Tensor:
        """Its bytes."""
        start = self.layout.slot_offset(slot)
        return self.slabs[device][start : start + self.layout.slot_bytes]

    def state(self, device: int, slot: int, buffer: int) -> Tensor:
        """The rows of the state that a request of NUM_IMAGE rows has in a buffer: fp32 [NUM_IMAGE, WIDTH]."""
        start, num_bytes = self.latents.piece(NUM_IMAGE, buffer)
        return self.slot(device, slot)[start : start + num_bytes].view(torch.float32).view(NUM_IMAGE, WIDTH)

    def versions(self, words: Tensor, me: int) -> SlotVersions:
        offset = self.layout.versions_offset
        return SlotVersions(words, self.bases, self.abort, self.status, device_id=me, versions_offset=offset)


def chunk(
    me: int,
    slot: int,
    *,
    source: int = 0,
    start_version: int = 0,
    end_version: int = 0,
    chunk_index: int = 0,
    part: Sequence[int] | None = None,
    partners: Sequence[int] | None = None,
) -> Tensor:
    """The words on `me`, of a state of NUM_IMAGE rows; it is alone unless others are named."""
    part, partners = part or (me,), partners or (me,)
    words = chunk_words(
        me,
        lanes_for(NUM_DEVICES),
        slot=slot,
        source=source,
        start_version=start_version,
        end_version=end_version,
        start_buffer=chunk_index % NUM_BUFFERS,
        end_buffer=(chunk_index + 1) % NUM_BUFFERS,
        part=part,
        rows=split(NUM_IMAGE, len(part))[part.index(me)],
        everyone=part,
        partners=partners,
    )
    return torch.tensor(words, dtype=torch.int32)
