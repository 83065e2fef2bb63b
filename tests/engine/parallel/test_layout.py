"""Offsets: nothing overlaps, everything is aligned, every shard fits."""

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.specs import make_spec
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.parallel.group import plan_group
from tetrion.engine.parallel.layout import CACHE_LINE, PAGE, ControlLayout, SlabLayout, slab_layout

specs = st.builds(
    make_spec,
    num_heads=st.integers(1, 40),
    head_dim=st.sampled_from([8, 32, 128]),
    in_channels=st.sampled_from([4, 16, 64]),
    text_dim=st.integers(1, 4096),
    pooled_dim=st.integers(1, 768),
    max_text_tokens=st.integers(1, 512),
    min_size=st.just(16),
    max_size=st.integers(8, 128).map(lambda n: 16 * n),
)


@given(spec=specs, num_devices=st.integers(1, 8), num_slots=st.integers(1, 9), itemsize=st.sampled_from([2, 4]))
def test_parts_do_not_overlap(spec: ModelSpec, num_devices: int, num_slots: int, itemsize: int) -> None:
    layout = slab_layout(spec, num_devices, num_slots, itemsize)
    parts = sorted(all_parts(layout))
    assert parts[0][0] == 0 and parts[-1][1] <= layout.num_bytes
    assert all(stop <= start for (_, stop), (start, _) in pairwise(parts))
    assert all(start % CACHE_LINE == 0 for start, _ in parts)
    paged = layout.q_offset, layout.k_offset, layout.v_offset, layout.output_offset, layout.num_bytes
    assert all(offset % PAGE == 0 for offset in (*paged, *map(layout.text_offset, range(num_slots))))


def all_parts(layout: SlabLayout) -> list[tuple[int, int]]:
    """Start and stop of everything in a slab that has a length."""
    slots, width = range(layout.num_slots), layout.itemsize
    sized = [(layout.counter_offset(d), CACHE_LINE) for d in range(layout.num_devices)]
    sized += [(layout.version_offset(slot), CACHE_LINE) for slot in slots]
    sized += [(offset, layout.exchange_bytes) for offset in (layout.q_offset, layout.k_offset, layout.v_offset)]
    sized += [(layout.output_offset, layout.output_bytes)]
    sized += [(layout.text_offset(slot), layout.max_text_tokens * layout.text_dim * width) for slot in slots]
    sized += [(layout.pooled_offset(slot), layout.pooled_dim * width) for slot in slots]
    sized += [(layout.latents_offset(slot), layout.max_image_tokens * layout.in_channels * 4) for slot in slots]
    return [(offset, offset + size) for offset, size in sized if size]


@given(spec=specs, degree=st.integers(2, 8), itemsize=st.sampled_from([2, 4]))
def test_every_shard_fits(spec: ModelSpec, degree: int, itemsize: int) -> None:
    layout = slab_layout(spec, 8, 1, itemsize)
    degree = min(degree, spec.num_heads)
    if degree < 2:
        return
    plan = plan_group(tuple(range(degree)), spec.max_text_tokens, spec.max_image_tokens, spec.num_heads)
    for shard in plan.shards:
        assert plan.num_tokens * len(shard.heads) * spec.head_dim * itemsize <= layout.exchange_bytes
        assert shard.num_tokens * spec.num_heads * spec.head_dim * itemsize <= layout.output_bytes


def test_layout_travels_as_json(spec: ModelSpec) -> None:
    layout = slab_layout(spec, 3, 5)
    assert msgspec.json.decode(msgspec.json.encode(layout), type=SlabLayout) == layout


def test_one_device_has_no_exchange_regions(spec: ModelSpec) -> None:
    layout = slab_layout(spec, 1, 1)
    assert layout.exchange_bytes == layout.output_bytes == 0


def test_bad_counts_are_errors_with_numbers(spec: ModelSpec) -> None:
    with pytest.raises(ValueError, match="got 0 and 4"):
        slab_layout(spec, 0, 4)
    with pytest.raises(ValueError, match="got 8"):
        slab_layout(spec, 1, 1, itemsize=8)
    with pytest.raises(AssertionError, match="slot 4 of 4"):
        slab_layout(spec, 1, 4).text_offset(4)


def test_control_words_have_a_cache_line_each() -> None:
    control = ControlLayout(num_devices=65)
    assert [control.abort_offset(d) for d in (0, 1, 64)] == [0, 64, 4096] and control.num_bytes == 2 * PAGE
    with pytest.raises(AssertionError):
        control.abort_offset(65)
