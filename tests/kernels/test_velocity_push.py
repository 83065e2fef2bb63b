"""A velocity lands in the partner's region and nowhere else; in a rehearsal, or after a failure, nowhere."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.slot_slabs import NUM_DEVICES, SlotSlabs, chunk
from tetrion.kernels.chunk_words import lanes_for, lists_of, rehearsal_words
from tetrion.kernels.velocity_push import velocity_push

ROWS, CHANNELS = 50, 12


def push(slabs: SlotSlabs, words: torch.Tensor, velocity: torch.Tensor, me: int) -> None:
    partners, offset = lists_of(words)[2], slabs.layout.velocity_offset
    velocity_push(velocity, partners, words, slabs.status, slabs.bases, offset, device_id=me)


@pytest.mark.parametrize("partners", [(2, 1), (1, 3)])
def test_the_partner_gets_all_rows(device, dtype, partners) -> None:
    slabs, velocity = SlotSlabs(), torch.randn(ROWS, CHANNELS).to(dtype)
    before = [slab.clone() for slab in slabs.slabs]
    push(slabs, chunk(1, 0, part=(1,), partners=partners), velocity, 1)
    (partner,) = {*partners} - {1}
    start = slabs.layout.velocity_offset
    raw = velocity.view(torch.uint8).flatten()
    assert torch.equal(slabs.slabs[partner][start : start + len(raw)], raw)
    before[partner][start : start + len(raw)] = raw
    assert all(torch.equal(slab, old) for slab, old in zip(slabs.slabs, before, strict=True)), "a store beside the rows"


@pytest.mark.parametrize("case", ["aborted", "rehearsal"])
def test_nothing_is_stored_but_in_a_chunk_that_goes_well(device, case) -> None:
    slabs, words = SlotSlabs(), chunk(1, 0, part=(1,), partners=(1, 2))
    before = [slab.clone() for slab in slabs.slabs]
    if case == "rehearsal":
        words = torch.tensor(rehearsal_words(1, lanes_for(NUM_DEVICES)), dtype=torch.int32)
    else:
        slabs.status[0] = 1
    push(slabs, words, torch.zeros(ROWS, CHANNELS), 1)
    assert all(torch.equal(slab, old) for slab, old in zip(slabs.slabs, before, strict=True))
