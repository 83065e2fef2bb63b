"""Views of slabs: right shapes over the right bytes, without copies."""

import numpy as np
import pytest
import torch

from tests.engine.parallel.toy_models import SPECS
from tetrion.engine.parallel.cpu.slab import SharedSlabs
from tetrion.engine.parallel.layout import NUM_BUFFERS, SlabLayout, slab_layout
from tetrion.engine.parallel.words import INVALID_VERSION, slot_version
from tetrion.engine.shape import StepShape

MODEL = "three segments"


@pytest.fixture
def layout() -> SlabLayout:
    return slab_layout(tuple(SPECS.values()), 2, 3)


@pytest.fixture
def buffers(layout: SlabLayout) -> list[memoryview]:
    return [memoryview(bytearray(layout.num_bytes)) for _ in range(2)]


def test_views_lie_where_the_layout_says(layout: SlabLayout, buffers: list[memoryview]) -> None:
    slabs, base = SharedSlabs(layout, 0, buffers), torch.frombuffer(buffers[1], dtype=torch.uint8).data_ptr()
    for branch in range(2):
        fields = slabs.constants(1, MODEL, 2, branch)
        shapes = {"text": (13, 12), "pooled": (1, 10), "reference": (20, 8)}
        assert {name: tuple(tensor.shape) for name, tensor in fields.items()} == shapes
        for name, tensor in fields.items():
            place = layout.slots[MODEL].place(name)
            offset = place.piece(1, branch if place.field.per_branch else 0).offset
            assert tensor.data_ptr() - base == layout.slot_offset(2) + offset, name
    for buffer in range(NUM_BUFFERS):
        state = slabs.state(1, MODEL, 2, buffer)
        offset = layout.slots[MODEL].latents.piece(1, buffer).offset
        assert state.shape == (100, 16) and state.data_ptr() - base == layout.slot_offset(2) + offset
    regions = [*slabs.qkv(1, 113, 3, 8), slabs.output(1, 57, 6, 8), slabs.velocity(1, 100, 8)]
    assert [tuple(region.shape) for region in regions] == [(113, 3, 8)] * 3 + [(57, 6, 8), (100, 8)]
    offsets = layout.q_offset, layout.k_offset, layout.v_offset, layout.output_offset, layout.velocity_offset
    assert [region.data_ptr() - base for region in regions] == list(offsets)


def test_branches_share_all_fields_but_those_of_their_own(layout: SlabLayout, buffers: list[memoryview]) -> None:
    first, second = (SharedSlabs(layout, 0, buffers).constants(0, MODEL, 1, branch) for branch in range(2))
    for name, tensor in first.items():
        tensor.fill_(1)
        assert (second[name] == 1).all() == (name == "reference"), name


def test_buffers_of_a_slot_share_nothing(layout: SlabLayout, buffers: list[memoryview]) -> None:
    slabs = SharedSlabs(layout, 0, buffers)
    for buffer in range(NUM_BUFFERS):
        slabs.state(0, MODEL, 1, buffer).fill_(buffer + 1)
    for buffer in range(NUM_BUFFERS):
        assert (slabs.state(0, MODEL, 1, buffer) == buffer + 1).all()
    assert not any(tensor.any() for branch in range(2) for tensor in slabs.constants(0, MODEL, 1, branch).values())


def test_all_processes_see_the_same_bytes(layout: SlabLayout, buffers: list[memoryview]) -> None:
    SharedSlabs(layout, 0, buffers).state(1, MODEL, 0, 2)[3, 4] = 2.5
    offset = layout.slot_offset(0) + layout.slots[MODEL].latents.piece(1, 2).offset
    seen = np.frombuffer(buffers[1], np.float32, 1600, offset).reshape(100, 16)
    assert seen[3, 4] == 2.5 and np.count_nonzero(np.frombuffer(buffers[1], np.float32)) == 1


def test_a_version_belongs_to_one_buffer_of_one_slot_of_one_slab(layout: SlabLayout, buffers: list[memoryview]) -> None:
    ours, theirs = (SharedSlabs(layout, device, buffers) for device in range(2))
    ours.version(0, 1, 2).store(slot_version(state_id=123, step_index=4))
    places = [(device, slot, buffer) for device in range(2) for slot in range(3) for buffer in range(NUM_BUFFERS)]
    versions = {place: theirs.version(*place).load() for place in places}
    assert versions == dict.fromkeys(places, INVALID_VERSION) | {(0, 1, 2): 123 << 32 | 5}


def test_a_copied_piece_is_all_that_changes(layout: SlabLayout, buffers: list[memoryview]) -> None:
    slabs, shape = SharedSlabs(layout, 0, buffers), StepShape(width=0, height=0, image=9, text=(5, 3), reference=2)
    for branch in range(2):
        for tensor in slabs.constants(1, MODEL, 2, branch).values():
            tensor.fill_(branch + 1)
    for buffer in range(NUM_BUFFERS):
        slabs.state(1, MODEL, 2, buffer).fill_(buffer + 3)
    for piece in (*layout.slots[MODEL].constants(shape), layout.slots[MODEL].state(shape, 1)):
        slabs.copy(piece, slot=2, source=1)
    states = [slabs.state(0, MODEL, 2, buffer) for buffer in range(NUM_BUFFERS)]
    assert (states[1][:9] == 4).all() and not states[1][9:].any() and not states[0].any() and not states[2].any()
    for branch in range(2):
        found = slabs.constants(0, MODEL, 2, branch)
        for name, rows in (("text", shape.text[branch]), ("pooled", 1), ("reference", 2)):
            value = 2 if name == "reference" else branch + 1
            assert (found[name][:rows] == value).all() and not found[name][rows:].any(), f"{name} {branch}"
    other = slabs.constants(0, MODEL, 1)
    assert not any(
        tensor.any() for tensor in (*other.values(), *(slabs.state(0, MODEL, 1, b) for b in range(NUM_BUFFERS)))
    )


def test_shapes_beyond_a_region_are_refused(layout: SlabLayout, buffers: list[memoryview]) -> None:
    slabs = SharedSlabs(layout, 0, buffers)
    with pytest.raises(AssertionError):
        slabs.qkv(0, 133, 6, 8)
    with pytest.raises(AssertionError):
        slabs.output(0, 133, 6, 8)
    with pytest.raises(AssertionError):
        slabs.velocity(0, 200, 16)


def test_elements_of_half_width_are_bfloat16_but_latents_keep_their_digits() -> None:
    layout = slab_layout(tuple(SPECS.values()), 2, 1, itemsize=2)
    slabs = SharedSlabs(layout, 0, [memoryview(bytearray(layout.num_bytes)) for _ in range(2)])
    assert slabs.state(0, MODEL, 0, 0).dtype == torch.float32
    assert {tensor.dtype for tensor in slabs.constants(0, MODEL, 0).values()} == {torch.bfloat16}
    assert slabs.velocity(0, 100, 8).dtype == slabs.output(0, 1, 5, 8).dtype == torch.bfloat16
