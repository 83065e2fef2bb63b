"""A member reads its own rows of its slot, and stores them in the same place of every member's slot; nothing else."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.slot_slabs import NUM_IMAGE, NUM_SLOTS, POISON, SlotSlabs, chunk
from tests.kernels.tolerance import poisoned
from tetrion.engine.parallel.group import split
from tetrion.kernels.latents_push import Place, latents_push, latents_read

GROUPS = [(2,), (1, 3), (3, 0, 1), (2, 3, 0, 1)]


def _place(slabs: SlotSlabs, degree: int) -> Place:
    return Place(slabs.layout.latents_offset(0), slabs.layout.slot_bytes, degree)


@pytest.mark.parametrize("members", GROUPS)
@pytest.mark.parametrize("slot", range(NUM_SLOTS))
def test_every_member_gets_all_rows(device, members, slot) -> None:
    slabs, channels = SlotSlabs(), 16
    before = [slab.clone() for slab in slabs.slabs]
    latents = torch.randn(NUM_IMAGE, channels)
    most = -(-NUM_IMAGE // len(members))
    for me, rows in zip(members, split(NUM_IMAGE, len(members)), strict=True):
        padded = poisoned(most, channels, dtype=torch.float32)
        padded[: len(rows)] = latents[rows.start : rows.stop]
        latents_push(padded, slabs.table(members, me), chunk(slot), slabs.bases, _place(slabs, len(members)))
    for me in members:
        mine = slabs.latents(me, slot)[:NUM_IMAGE]
        assert torch.equal(mine, latents)
        mine.view(torch.uint8).fill_(POISON)
    assert all(torch.equal(slab, old) for slab, old in zip(slabs.slabs, before, strict=True)), "a store beside the rows"


@pytest.mark.parametrize("members", GROUPS)
def test_own_rows_are_read_and_padding_is_zero(device, members) -> None:
    slabs, channels = SlotSlabs(), 16
    most = -(-NUM_IMAGE // len(members))
    for me, rows in zip(members, split(NUM_IMAGE, len(members)), strict=True):
        slabs.latents(me, 1)[:NUM_IMAGE] = whole = torch.randn(NUM_IMAGE, channels)
        out = poisoned(most, channels, dtype=torch.float32)
        latents_read(out, slabs.table(members, me), chunk(1), slabs.bases, _place(slabs, len(members)))
        assert torch.equal(out[: len(rows)], whole[rows.start : rows.stop])
        assert not out[len(rows) :].any()


def test_latents_are_fp32(device) -> None:
    slabs = SlotSlabs()
    with pytest.raises(AssertionError, match="bfloat16"):
        half = torch.zeros(NUM_IMAGE, 16, dtype=torch.bfloat16)
        latents_push(half, slabs.table((0,), 0), chunk(0), slabs.bases, _place(slabs, 1))
