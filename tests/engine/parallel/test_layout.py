"""Offsets: nothing overlaps, everything is aligned, every request and every shard fits."""

from itertools import pairwise

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.engine.parallel.toy_models import SPECS
from tests.engine.specs import make_spec
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.parallel.group import BranchLayout, plan_group
from tetrion.engine.parallel.layout import CACHE_LINE, NUM_BUFFERS, PAGE, ControlLayout, SlabLayout, slab_layout
from tetrion.engine.shape import StepShape

flux_specs = st.builds(
    make_spec,
    name=st.just("flux"),
    num_heads=st.integers(1, 40),
    head_dim=st.sampled_from([8, 32, 128]),
    in_channels=st.sampled_from([4, 16, 64]),
    pooled_dim=st.integers(1, 768),
    max_text_tokens=st.integers(1, 512),
    min_size=st.just(16),
    max_size=st.integers(8, 128).map(lambda n: 16 * n),
    max_branches=st.integers(1, 2),
)
spec_lists = st.tuples(flux_specs, st.lists(st.sampled_from(sorted(SPECS)), unique=True)).map(
    lambda drawn: [drawn[0], *(SPECS[name] for name in drawn[1])]
)
itemsizes = st.sampled_from([2, 4])


@st.composite
def shapes_of(draw: st.DrawFn, spec: ModelSpec) -> StepShape:
    """Any request that the model takes."""
    num_branches = draw(st.integers(1, spec.max_branches))
    text = st.tuples(*[st.integers(0, spec.max_rows("text"))] * num_branches)
    image, reference = (st.integers(least, spec.max_rows(kind)) for least, kind in ((1, "image"), (0, "reference")))
    return StepShape(width=0, height=0, image=draw(image), text=draw(text), reference=draw(reference))


@given(specs=spec_lists, num_devices=st.integers(1, 8), num_slots=st.integers(1, 9), itemsize=itemsizes)
def test_parts_of_a_slab_do_not_overlap(
    specs: list[ModelSpec], num_devices: int, num_slots: int, itemsize: int
) -> None:
    layout = slab_layout(specs, num_devices, num_slots, itemsize)
    slots = range(layout.num_slots)
    sized = [(layout.counter_offset(d), CACHE_LINE) for d in range(layout.num_devices)]
    sized += [(layout.version_offset(slot), CACHE_LINE) for slot in slots]
    sized += [(layout.q_offset, layout.query_bytes)]
    sized += [(offset, layout.key_bytes) for offset in (layout.k_offset, layout.v_offset)]
    sized += [(layout.output_offset, layout.output_bytes), (layout.velocity_offset, layout.velocity_bytes)]
    sized += [(layout.slot_offset(slot), layout.slot_bytes) for slot in slots]
    parts = sorted((offset, offset + size) for offset, size in sized if size)
    assert parts[0][0] == 0 and parts[-1][1] == layout.num_bytes
    assert all(stop <= start for (_, stop), (start, _) in pairwise(parts))
    assert all(start % CACHE_LINE == 0 for start, _ in parts)
    paged = layout.q_offset, layout.k_offset, layout.v_offset, layout.output_offset, layout.velocity_offset
    assert all(offset % PAGE == 0 for offset in (*paged, layout.num_bytes, *map(layout.slot_offset, slots)))


@given(specs=spec_lists, itemsize=itemsizes)
def test_fields_of_a_slot_do_not_overlap(specs: list[ModelSpec], itemsize: int) -> None:
    layout = slab_layout(specs, 2, 1, itemsize)
    for spec in specs:
        slot = layout.slots[spec.name]
        pieces = [
            slot.place(field.name).piece(spec.max_rows(field.rows), part)
            for field in spec.fields
            for part in range(NUM_BUFFERS if field.changes else spec.max_branches if field.per_branch else 1)
        ]
        assert all(a.offset + a.num_bytes <= b.offset for a, b in pairwise(pieces))
        assert all(piece.offset % CACHE_LINE == 0 for piece in pieces)
        assert pieces[-1].offset + pieces[-1].num_bytes <= slot.num_bytes <= layout.slot_bytes


@given(data=st.data(), specs=spec_lists, itemsize=itemsizes)
def test_pieces_are_exactly_the_requests_rows(data: st.DataObject, specs: list[ModelSpec], itemsize: int) -> None:
    spec = data.draw(st.sampled_from(specs))
    shape, slot = data.draw(shapes_of(spec)), slab_layout(specs, 2, 1, itemsize).slots[spec.name]
    constants, changing = slot.constants(shape), [slot.state(shape, buffer) for buffer in range(NUM_BUFFERS)]
    expected = {False: set(), True: set()}
    for field in spec.fields:
        for part in range(NUM_BUFFERS if field.changes else shape.num_branches if field.per_branch else 1):
            width = field.width * (4 if field.fp32 else itemsize)
            place, branch = slot.place(field.name), part if field.per_branch else 0
            start = place.offset + part * place.part_bytes
            expected[field.changes].add((start, shape.rows(field.rows, branch) * width))
    assert set(constants) == expected[False] and set(changing) == expected[True]
    touched = sorted((offset, offset + size) for offset, size in (*constants, *changing) if size)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(touched)), "a piece lies in another's bytes"
    assert not touched or touched[-1][1] <= slot.num_bytes


@given(data=st.data(), specs=spec_lists, degree=st.integers(2, 8), itemsize=itemsizes)
def test_regions_suffice_for_every_shard_of_every_request(
    data: st.DataObject, specs: list[ModelSpec], degree: int, itemsize: int
) -> None:
    layout = slab_layout(specs, 8, 1, itemsize)
    spec = data.draw(st.sampled_from(specs))
    shape = data.draw(shapes_of(spec))
    branches = BranchLayout(members=tuple(range(degree)), num_branches=shape.num_branches)
    latents = next(field for field in spec.fields if field.changes)
    for part in branches.parts:
        for branch in branches.branches_of(part[0]):
            counts = shape.counts(spec.segments, branch)
            assume(len(part) <= min(spec.num_key_heads, max(counts)))
            plan = plan_group(part, counts, spec.num_heads, spec.heads_per_key)
            for device in part:
                own = plan.shape_of(device)
                if own.degree > 1:
                    exchanged = own.num_tokens * own.own_heads * spec.head_dim * itemsize
                    assert exchanged <= layout.query_bytes
                    assert exchanged // spec.heads_per_key <= layout.key_bytes
                    assert own.num_local * spec.num_heads * spec.head_dim * itemsize <= layout.output_bytes
                if len(branches.parts) > 1:
                    assert own.padded[spec.stepped] * latents.width * itemsize <= layout.velocity_bytes


def test_a_layout_travels_as_json() -> None:
    layout = slab_layout(tuple(SPECS.values()), 3, 5)
    assert msgspec.json.decode(msgspec.json.encode(layout), type=SlabLayout) == layout


def test_one_device_has_no_exchange_regions(spec: ModelSpec) -> None:
    layout = slab_layout([spec], 1, 1)
    assert layout.query_bytes == layout.key_bytes == layout.output_bytes == layout.velocity_bytes == 0


def test_models_without_guidance_branches_have_no_velocity_region(spec: ModelSpec) -> None:
    assert slab_layout([msgspec.structs.replace(spec, max_branches=1)], 2, 1).velocity_bytes == 0


def test_bad_counts_are_errors_with_numbers(spec: ModelSpec) -> None:
    with pytest.raises(ValueError, match="got 0 and 4"):
        slab_layout([spec], 0, 4)
    with pytest.raises(ValueError, match="got 8"):
        slab_layout([spec], 1, 1, itemsize=8)
    layout = slab_layout([spec], 1, 4)
    with pytest.raises(AssertionError, match="slot 4 of 4"):
        layout.slot_offset(4)
    with pytest.raises(AssertionError, match="14 rows of text, at most 13 fit"):
        layout.slots[spec.name].place("text").piece(14)


def test_control_words_have_a_cache_line_each() -> None:
    control = ControlLayout(num_devices=65)
    assert [control.abort_offset(d) for d in (0, 1, 64)] == [0, 64, 4096] and control.num_bytes == 2 * PAGE
    with pytest.raises(AssertionError):
        control.abort_offset(65)
