"""Pieces of a state are copied from the slot and the device that the words name, and only if they want a version."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.slot_slabs import POISON, SPEC, SlotSlabs, chunk
from tetrion.engine.shape import StepShape
from tetrion.kernels.state_pull import UNIT_BYTES, state_pull

ME, SOURCE = 2, 3
VERSION = 7 << 32 | 1
SHAPE = StepShape(width=96, height=80, image=30, text=(7, 2))
Pieces = list[tuple[int, int]]


def _pull(slabs: SlotSlabs, words: torch.Tensor, pieces: Pieces) -> None:
    layout = slabs.layout
    slots = {"slots_offset": layout.slots_offset, "slot_bytes": layout.slot_bytes}
    state_pull(pieces, words, slabs.status, slabs.bases, device_id=ME, **slots)


def _constants(slabs: SlotSlabs) -> Pieces:
    return list(slabs.layout.slots[SPEC.name].constants(SHAPE))


@pytest.mark.parametrize("slot", [0, 2])
@pytest.mark.parametrize("pieces", ["constants", 0, 2, [(0, 280), (512, 0), (1024, 17 * 640)], [(16, 2)], []])
def test_all_pieces_are_copied_and_nothing_else(device, slot, pieces) -> None:
    """A number: the state in that buffer."""
    slabs = SlotSlabs()
    if isinstance(pieces, int):
        pieces = [slabs.layout.slots[SPEC.name].state(SHAPE, pieces)]
    pieces = _constants(slabs) if pieces == "constants" else pieces
    ours, theirs = slabs.slot(ME, slot), slabs.slot(SOURCE, slot)
    theirs.copy_(torch.randint(0, POISON, theirs.shape, dtype=torch.uint8))
    source = slabs.slabs[SOURCE].clone()
    _pull(slabs, chunk(ME, slot, source=SOURCE, start_version=VERSION), pieces)
    for first, size in pieces:
        assert torch.equal(ours[first : first + size], theirs[first : first + size])
        ours[first : first + -(-size // UNIT_BYTES) * UNIT_BYTES] = POISON
    assert torch.equal(slabs.slabs[ME], slabs.slabs[0]), "a store beside the pieces"
    assert torch.equal(slabs.slabs[SOURCE], source), "the source changed"


@pytest.mark.parametrize("case", ["own state", "no version wanted", "broken"])
def test_nothing_is_copied(device, case) -> None:
    slabs = SlotSlabs()
    slabs.slabs[SOURCE].fill_(1)
    if case == "broken":
        slabs.status[0] = 1
    source, wanted = ME if case == "own state" else SOURCE, 0 if case == "no version wanted" else VERSION
    _pull(slabs, chunk(ME, 0, source=source, start_version=wanted), _constants(slabs))
    assert torch.equal(slabs.slabs[ME], slabs.slabs[0])
