"""A member reads its own rows of its start buffer, and stores them in the same place of its part's end buffers."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.slot_slabs import NUM_DEVICES, NUM_IMAGE, NUM_SLOTS, POISON, WIDTH, SlotSlabs, chunk
from tests.kernels.tolerance import poisoned
from tetrion.engine.parallel.group import split
from tetrion.engine.parallel.layout import NUM_BUFFERS
from tetrion.kernels.chunk_words import lanes_for, rehearsal_words
from tetrion.kernels.state_push import state_push
from tetrion.kernels.state_read import state_read

PARTS = [(2,), (1, 3), (3, 0, 1), (2, 3, 0, 1)]


def most_rows(part: tuple[int, ...]) -> int:
    return -(-NUM_IMAGE // len(part))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("slot", range(NUM_SLOTS))
def test_every_member_gets_all_rows_in_its_end_buffer_and_nothing_else(device, part, slot) -> None:
    slabs, chunk_index = SlotSlabs(), 4 + slot
    before = [slab.clone() for slab in slabs.slabs]
    state = torch.randn(NUM_IMAGE, WIDTH)
    for me, rows in zip(part, split(NUM_IMAGE, len(part)), strict=True):
        padded = poisoned(most_rows(part), WIDTH, dtype=torch.float32)
        padded[: len(rows)] = state[rows.start : rows.stop]
        words = chunk(me, slot, chunk_index=chunk_index, part=part)
        state_push(padded, words, slabs.status, slabs.bases, slabs.place, degree=len(part))
    for me in part:
        mine = slabs.state(me, slot, (chunk_index + 1) % NUM_BUFFERS)
        assert torch.equal(mine, state)
        mine.view(torch.uint8).fill_(POISON)
    assert all(torch.equal(slab, old) for slab, old in zip(slabs.slabs, before, strict=True)), "a store beside the rows"


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("chunk_index", range(NUM_BUFFERS))
def test_own_rows_are_read_from_the_start_buffer_and_padding_is_zero(device, part, chunk_index) -> None:
    slabs = SlotSlabs()
    for me, rows in zip(part, split(NUM_IMAGE, len(part)), strict=True):
        for buffer in range(NUM_BUFFERS):
            slabs.state(me, 1, buffer).normal_()
        whole = slabs.state(me, 1, chunk_index).clone()
        out = poisoned(most_rows(part), WIDTH, dtype=torch.float32)
        words = chunk(me, 1, chunk_index=chunk_index, part=part)
        state_read(out, words, slabs.bases, slabs.place, device_id=me)
        assert torch.equal(out[: len(rows)], whole[rows.start : rows.stop])
        assert not out[len(rows) :].any()


@pytest.mark.parametrize("case", ["aborted", "wrong version", "rehearsal"])
def test_nothing_is_stored_but_in_a_chunk_that_goes_well(device, case) -> None:
    slabs, words = SlotSlabs(), chunk(1, 0, part=(1, 3))
    before = [slab.clone() for slab in slabs.slabs]
    if case == "rehearsal":
        words = torch.tensor(rehearsal_words(1, lanes_for(NUM_DEVICES)), dtype=torch.int32)
        out = poisoned(most_rows((1, 3)), WIDTH, dtype=torch.float32)
        state_read(out, words, slabs.bases, slabs.place, device_id=1)
        assert not out.any()
    else:
        slabs.status[("aborted", "wrong version").index(case)] = 1
    state_push(torch.zeros(23, WIDTH), words, slabs.status, slabs.bases, slabs.place, degree=2)
    assert all(torch.equal(slab, old) for slab, old in zip(slabs.slabs, before, strict=True))


def test_a_state_is_fp32(device) -> None:
    slabs = SlotSlabs()
    with pytest.raises(AssertionError, match="bfloat16"):
        half = torch.zeros(NUM_IMAGE, WIDTH, dtype=torch.bfloat16)
        state_push(half, chunk(0, 0), slabs.status, slabs.bases, slabs.place, degree=1)
