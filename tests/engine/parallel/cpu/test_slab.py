"""Views of slabs: right shapes over the right bytes, without copies."""

import numpy as np
import pytest
import torch

from tests.engine.parallel.toy_models import SPECS
from tetrion.engine.parallel.cpu.slab import SharedSlabs
from tetrion.engine.parallel.layout import SlabLayout, slab_layout
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
        fields = slabs.fields(1, MODEL, 2, branch)
        shapes = {"text": (13, 12), "pooled": (1, 10), "reference": (20, 8), "latents": (100, 16)}
        assert {name: tuple(tensor.shape) for name, tensor in fields.items()} == shapes
        for name, tensor in fields.items():
            place = layout.slots[MODEL].place(name)
            offset = place.piece(1, branch if place.field.per_branch else 0).offset
            assert tensor.data_ptr() - base == layout.slot_offset(2) + offset, name
    regions = [*slabs.qkv(1, 113, 3, 8), slabs.output(1, 57, 6, 8), slabs.velocity(1, 100, 8)]
    assert [tuple(region.shape) for region in regions] == [(113, 3, 8)] * 3 + [(57, 6, 8), (100, 8)]
    offsets = layout.q_offset, layout.k_offset, layout.v_offset, layout.output_offset, layout.velocity_offset
    assert [region.data_ptr() - base for region in regions] == list(offsets)


def test_branches_share_all_fields_but_those_of_their_own(layout: SlabLayout, buffers: list[memoryview]) -> None:
    first, second = (SharedSlabs(layout, 0, buffers).fields(0, MODEL, 1, branch) for branch in range(2))
    for name, tensor in first.items():
        tensor.fill_(1)
        assert (second[name] == 1).all() == (name in ("reference", "latents")), name


def test_all_processes_see_the_same_bytes(layout: SlabLayout, buffers: list[memoryview]) -> None:
    SharedSlabs(layout, 0, buffers).fields(1, MODEL, 0)["latents"][3, 4] = 2.5
    offset = layout.slot_offset(0) + layout.slots[MODEL].place("latents").offset
    seen = np.frombuffer(buffers[1], np.float32, 1600, offset).reshape(100, 16)
    assert seen[3, 4] == 2.5 and np.count_nonzero(np.frombuffer(buffers[1], np.float32)) == 1


def test_a_version_belongs_to_one_slot_of_one_slab(layout: SlabLayout, buffers: list[memoryview]) -> None:
    ours, theirs = (SharedSlabs(layout, device, buffers) for device in range(2))
    ours.version(0, 1).store(slot_version(state_id=123, step_index=4))
    versions = [theirs.version(device, slot).load() for device in range(2) for slot in range(3)]
    assert versions == [INVALID_VERSION, 123 << 32 | 5, *[INVALID_VERSION] * 4]


def test_an_invalid_version_leaves_the_states_number(layout: SlabLayout, buffers: list[memoryview]) -> None:
    version = SharedSlabs(layout, 0, buffers).version(0, 1)
    version.store(slot_version(state_id=123, step_index=4))
    version.store(INVALID_VERSION)
    assert version.load() == INVALID_VERSION and version.load_state() == 123


def test_a_copied_piece_is_all_that_changes(layout: SlabLayout, buffers: list[memoryview]) -> None:
    slabs, shape = SharedSlabs(layout, 0, buffers), StepShape(width=0, height=0, image=9, text=(5, 3), reference=2)
    for branch in range(2):
        for tensor in slabs.fields(1, MODEL, 2, branch).values():
            tensor.fill_(branch + 1)
    for piece in layout.slots[MODEL].pieces(shape, changing=False):
        slabs.copy(piece, slot=2, source=1)
    for branch in range(2):
        found = slabs.fields(0, MODEL, 2, branch)
        assert not found["latents"].any(), "it is no constant"
        for name, rows in (("text", shape.text[branch]), ("pooled", 1), ("reference", 2)):
            value = 2 if name == "reference" else branch + 1
            assert (found[name][:rows] == value).all() and not found[name][rows:].any(), f"{name} {branch}"
    other = slabs.fields(0, MODEL, 1)
    assert not any(tensor.any() for tensor in other.values())


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
    fields = slabs.fields(0, MODEL, 0)
    assert fields.pop("latents").dtype == torch.float32
    assert {tensor.dtype for tensor in fields.values()} == {torch.bfloat16}
    assert slabs.velocity(0, 100, 8).dtype == slabs.output(0, 1, 5, 8).dtype == torch.bfloat16
