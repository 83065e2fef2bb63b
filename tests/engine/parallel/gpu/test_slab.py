"""Views over addresses: right shapes over the right bytes; and the table of addresses that kernels use."""

import pytest
import torch

from tests.engine.parallel.conftest import tiny_spec
from tetrion.engine.parallel.gpu.slab import GpuSlabs
from tetrion.engine.parallel.layout import NUM_BUFFERS, SlabLayout, slab_layout

CPU = torch.device("cpu")


@pytest.fixture
def layout() -> SlabLayout:
    return slab_layout([tiny_spec()], 2, 3, itemsize=2)


@pytest.fixture
def memory(layout: SlabLayout) -> list[torch.Tensor]:
    return [torch.zeros(layout.num_bytes, dtype=torch.uint8) for _ in range(2)]


@pytest.fixture
def slabs(layout: SlabLayout, memory: list[torch.Tensor]) -> GpuSlabs:
    slabs = GpuSlabs(layout, 1, CPU)
    for device, slab in enumerate(memory):
        slabs.place(device, slab.data_ptr())
    return slabs


def test_views_lie_where_the_layout_says(layout: SlabLayout, slabs: GpuSlabs, memory: list[torch.Tensor]) -> None:
    base = memory[1].data_ptr()
    places = layout.slots["tiny"]
    for branch in (0, 1):
        fields = slabs.constants(1, "tiny", 2, branch)
        assert set(fields) == {"text", "pooled"}
        for name, rows, width in (("text", 13, 48), ("pooled", 1, 10)):
            start = layout.slot_offset(2) + places.place(name).piece(1, branch).offset
            field = fields[name]
            assert field.shape == (rows, width) and field.dtype == torch.bfloat16 and field.data_ptr() == base + start
    for buffer in range(NUM_BUFFERS):
        start, state = layout.slot_offset(2) + places.latents.piece(1, buffer).offset, slabs.state(1, "tiny", 2, buffer)
        assert state.shape == (100, 16) and state.dtype == torch.float32 and state.data_ptr() == base + start
    q, k, v = slabs.qkv(1, 113, 3, 8)
    assert [x.data_ptr() - base for x in (q, k, v)] == [layout.q_offset, layout.k_offset, layout.v_offset]
    assert slabs.output(1, 57, 6, 8).data_ptr() == base + layout.output_offset
    assert slabs.velocity(1, 100, 16).data_ptr() == base + layout.velocity_offset
    slabs.counters().fill_(1)
    ones = memory[1].nonzero().flatten()
    assert (ones.min(), ones.max()) == (layout.counters_offset, layout.counter_offset(1) + 60)


def test_kernels_follow_where_slabs_are(slabs: GpuSlabs, memory: list[torch.Tensor]) -> None:
    bases = slabs.bases
    assert bases.tolist() == [slab.data_ptr() for slab in memory] and slabs.mapped == (0, 1)
    slabs.place(0, 0)
    assert bases.tolist() == [0, memory[1].data_ptr()] and slabs.mapped == (1,)
    with pytest.raises(AssertionError, match="device 0's slab is not mapped"):
        slabs.constants(0, "tiny", 0)


def test_shapes_beyond_a_region_are_refused(slabs: GpuSlabs) -> None:
    with pytest.raises(AssertionError, match="of a region of"):
        slabs.qkv(1, 113, 6, 32)
    with pytest.raises(AssertionError, match="of a region of"):
        slabs.output(1, 113, 6, 32)
    with pytest.raises(AssertionError, match="of a region of"):
        slabs.velocity(1, 200, 16)
