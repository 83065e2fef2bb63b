"""Views of slabs: right shapes over the right bytes, without copies."""

import numpy as np
import pytest
import torch

from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.parallel.layout import slab_layout
from tetrion.engine.parallel.shared_slab import SharedSlabs
from tetrion.engine.parallel.words import INVALID_VERSION, slot_version


@pytest.fixture
def buffers(spec: ModelSpec) -> list[memoryview]:
    return [memoryview(bytearray(slab_layout(spec, 2, 3).num_bytes)) for _ in range(2)]


def test_views_lie_where_the_layout_says(spec: ModelSpec, buffers: list[memoryview]) -> None:
    layout = slab_layout(spec, 2, 3)
    slabs, base = SharedSlabs(layout, 0, buffers), torch.frombuffer(buffers[1], dtype=torch.uint8).data_ptr()
    state = slabs.slot(1, 2)
    assert state.text.shape == (13, 12) and state.text.data_ptr() == base + layout.text_offset(2)
    assert state.pooled.shape == (10,) and state.pooled.data_ptr() == base + layout.pooled_offset(2)
    assert state.latents.shape == (100, 16) and state.latents.data_ptr() == base + layout.latents_offset(2)
    q, k, v = slabs.qkv(1, 113, 3, 8)
    assert q.shape == k.shape == v.shape == (113, 3, 8)
    assert [x.data_ptr() - base for x in (q, k, v)] == [layout.q_offset, layout.k_offset, layout.v_offset]
    output = slabs.output(1, 57, 6, 8)
    assert output.shape == (57, 6, 8) and output.data_ptr() == base + layout.output_offset


def test_all_processes_see_the_same_bytes(spec: ModelSpec, buffers: list[memoryview]) -> None:
    layout = slab_layout(spec, 2, 3)
    SharedSlabs(layout, 0, buffers).slot(1, 0).latents[3, 4] = 2.5
    seen = np.frombuffer(buffers[1], np.float32, 1600, layout.latents_offset(0)).reshape(100, 16)
    assert seen[3, 4] == 2.5 and np.count_nonzero(np.frombuffer(buffers[1], np.float32)) == 1


def test_version_belongs_to_one_slot_of_one_slab(spec: ModelSpec, buffers: list[memoryview]) -> None:
    ours, theirs = (SharedSlabs(slab_layout(spec, 2, 3), device, buffers) for device in range(2))
    ours.slot(0, 1).version = slot_version(state_id=123, step_index=4)
    versions = [theirs.slot(device, slot).version for device in range(2) for slot in range(3)]
    assert versions == [INVALID_VERSION, 123 << 32 | 5, *[INVALID_VERSION] * 4]


def test_shapes_beyond_a_region_are_refused(spec: ModelSpec, buffers: list[memoryview]) -> None:
    slabs = SharedSlabs(slab_layout(spec, 2, 3), 0, buffers)
    with pytest.raises(AssertionError):
        slabs.qkv(0, 113, 6, 8)
    with pytest.raises(AssertionError):
        slabs.output(0, 113, 6, 8)


def test_half_width_elements_are_bfloat16_but_latents_keep_their_digits(spec: ModelSpec) -> None:
    layout = slab_layout(spec, 1, 1, itemsize=2)
    slabs = SharedSlabs(layout, 0, [memoryview(bytearray(layout.num_bytes))])
    state = slabs.slot(0, 0)
    assert state.text.dtype == state.pooled.dtype == torch.bfloat16 and state.text.shape == (13, 12)
    assert state.latents.dtype == torch.float32 and state.latents.shape == (100, 16)
