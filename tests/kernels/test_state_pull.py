"""A state is copied whole, from the slot and the device that the words name, and only if they want one."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.slot_slabs import POISON, SlotSlabs, chunk
from tetrion.kernels.state_pull import UNIT_BYTES, state_pull

VERSION = 7 << 32 | 1


def _pull(slabs: SlotSlabs, words: torch.Tensor, sizes: tuple[int, int, int]) -> list[tuple[int, int]]:
    layout = slabs.layout
    pieces = list(zip((0, layout.pooled_in_slot, layout.latents_in_slot), sizes, strict=True))
    slots = {"slots_offset": layout.slots_offset, "slot_bytes": layout.slot_bytes}
    state_pull(slabs.table((1, 2), 2), words, slabs.bases, slabs.status, tuple(pieces), **slots)
    return pieces


@pytest.mark.parametrize("slot", [0, 2])
@pytest.mark.parametrize("sizes", [(280, 64, 2880), (0, 64, 64), (360, 2, 4096), (16, 64, 17 * 64)])
def test_all_pieces_are_copied_and_nothing_else(device, slot, sizes) -> None:
    slabs = SlotSlabs()
    start, stop = slabs.layout.text_offset(slot), slabs.layout.text_offset(slot) + slabs.layout.slot_bytes
    slabs.slabs[3][start:stop] = theirs = torch.randint(0, POISON, (stop - start,), dtype=torch.uint8)
    source = slabs.slabs[3].clone()
    pieces = _pull(slabs, chunk(slot, source=3, start_version=VERSION), sizes)
    ours = slabs.slabs[2][start:stop]
    for first, size in pieces:
        assert torch.equal(ours[first : first + size], theirs[first : first + size])
        ours[first : first + -(-size // UNIT_BYTES) * UNIT_BYTES] = POISON
    slabs.version(2, 0).fill_(slabs.version(0, 0).item())
    assert torch.equal(slabs.slabs[2], slabs.slabs[0]), "a store beside the pieces"
    assert torch.equal(slabs.slabs[3], source), "the source changed"


@pytest.mark.parametrize("case", ["own state", "no version wanted", "broken"])
def test_nothing_is_copied(device, case) -> None:
    slabs = SlotSlabs()
    slabs.slabs[3].fill_(1)
    if case == "broken":
        slabs.status[0] = 1
    words = chunk(
        0, source=2 if case == "own state" else 3, start_version=0 if case == "no version wanted" else VERSION
    )
    _pull(slabs, words, (280, 64, 2880))
    assert torch.equal(slabs.slabs[2], slabs.slabs[0])
