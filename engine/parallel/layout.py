"""Where everything lies in shared memory: one peer slab per device, and one control segment owned by the engine.

Owns byte offsets and nothing else; knows no torch, no processes, no groups. A slab, offsets ascending:

    ┌ counters   num_devices cache lines: word `s` is written by device `s` alone (parallel/cpu/barrier.py)
    ├ versions   num_slots cache lines, written by the slab's owner alone: the version of each of the slot's buffers,
    │            its sequence (words.py)
    ├ q, k, v    [rows of the sequence, local heads, head_dim] each, in canonical order; k and v may have fewer heads
    ├ output     [local rows, num_heads * head_dim]: attention output of this device's own rows
    ├ velocity   [local rows of the stepped segment, channels]: what the partner in another guidance branch computed
    └ slots      num_slots × one request's state: the fields that its model declares (ModelSpec.fields), one behind the
                 other, each as large as the model's largest request makes it; what changes has NUM_BUFFERS of them

Counters are 32 bits wide, because a futex waits on 32-bit words; they wrap, and are compared so that this is harmless.
Exchange regions are sized for degree 2, the widest shard that is ever exchanged; one device alone has none. Models that
share a pool share all regions and slots, which are sized for the largest.

A chunk of steps reads one buffer of the field that changes and writes the next, so that the state before it is whole
until the chunk after the next: a request has at most two chunks in flight, and whatever becomes of both, it can go on
from what it had before.
"""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from tetrion.engine.model_spec import ModelSpec, SlotField
from tetrion.engine.shape import StepShape

CACHE_LINE = 64
PAGE = 4096
FP32_BYTES = 4
NUM_BUFFERS = 3


class ControlLayout(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's control segment: one 32-bit abort word per device, each on its own cache line."""

    num_devices: int

    @property
    def num_bytes(self) -> int:
        return _align(self.num_devices * CACHE_LINE, PAGE)

    def abort_offset(self, device: int) -> int:
        assert 0 <= device < self.num_devices, f"device {device} of {self.num_devices}"
        return device * CACHE_LINE


class Piece(NamedTuple):
    """Consecutive bytes of a slot: where they begin in it, and how many."""

    offset: int
    num_bytes: int


class FieldPlace(msgspec.Struct, frozen=True, kw_only=True):
    """Where a field lies in a slot: [max_rows, width] at `offset`; the next part, of another branch or in another
    buffer, `part_bytes` behind it."""

    field: SlotField
    offset: int
    max_rows: int
    itemsize: int
    part_bytes: int

    def piece(self, num_rows: int, part: int = 0) -> Piece:
        """The first rows of a part."""
        assert num_rows <= self.max_rows, f"{num_rows} rows of {self.field.name}, at most {self.max_rows} fit"
        return Piece(self.offset + part * self.part_bytes, num_rows * self.field.width * self.itemsize)


class SlotLayout(msgspec.Struct, frozen=True, kw_only=True):
    """A request's state in a slot, of one model."""

    places: tuple[FieldPlace, ...]
    num_bytes: int

    def place(self, name: str) -> FieldPlace:
        return next(place for place in self.places if place.field.name == name)

    @property
    def latents(self) -> FieldPlace:
        """Of the field that steps change."""
        return next(place for place in self.places if place.field.changes)

    def constants(self, shape: StepShape) -> tuple[Piece, ...]:
        """What a request of `shape` has in it of the fields that steps do not change."""
        return tuple(
            place.piece(shape.rows(place.field.rows, branch), branch)
            for place in self.places
            if not place.field.changes
            for branch in range(shape.num_branches if place.field.per_branch else 1)
        )

    def state(self, shape: StepShape, buffer: int) -> Piece:
        """A request's state in one of its buffers."""
        return self.latents.piece(shape.rows(self.latents.field.rows), buffer)


class SlabLayout(msgspec.Struct, frozen=True, kw_only=True):
    """Byte offsets of one slab (all devices' slabs are alike). `*_bytes` of regions and slots are rounded up to pages.

    `itemsize` is the size in bytes of one element of every tensor but the fields that are fp32 always: 4 (fp32) or 2
    (bf16). `slots`: what a slot holds, by model.
    """

    num_devices: int
    num_slots: int
    itemsize: int
    counters_offset: int
    versions_offset: int
    q_offset: int
    k_offset: int
    v_offset: int
    query_bytes: int
    key_bytes: int
    output_offset: int
    output_bytes: int
    velocity_offset: int
    velocity_bytes: int
    slots_offset: int
    slot_bytes: int
    slots: dict[str, SlotLayout]
    num_bytes: int

    @property
    def state_bytes(self) -> int:
        """The largest state that steps change, of all models."""
        return max(slot.latents.part_bytes for slot in self.slots.values())

    def counter_offset(self, sender: int) -> int:
        """The counter in this slab that device `sender` writes."""
        assert 0 <= sender < self.num_devices, f"device {sender} of {self.num_devices}"
        return self.counters_offset + sender * CACHE_LINE

    def version_offset(self, slot: int) -> int:
        """Of the slot's cache line, see words.py."""
        assert 0 <= slot < self.num_slots, f"slot {slot} of {self.num_slots}"
        return self.versions_offset + slot * CACHE_LINE

    def slot_offset(self, slot: int) -> int:
        assert 0 <= slot < self.num_slots, f"slot {slot} of {self.num_slots}"
        return self.slots_offset + slot * self.slot_bytes


def slab_layout(specs: Sequence[ModelSpec], num_devices: int, num_slots: int, itemsize: int = 4) -> SlabLayout:
    """The layout for models that share a pool. Raises ValueError for counts below 1 or an element size other than 2 or
    4 bytes."""
    if num_devices < 1 or num_slots < 1:
        raise ValueError(f"a slab needs at least 1 device and 1 slot, got {num_devices} and {num_slots}")
    if itemsize not in (2, 4):
        raise ValueError(f"slab elements are 2 or 4 bytes wide, got {itemsize}")
    slots = {spec.name: _slot_layout(spec, itemsize) for spec in specs}
    query_bytes = max(map(_query_elements, specs)) * itemsize if num_devices > 1 else 0
    key_bytes = max(map(_key_elements, specs)) * itemsize if num_devices > 1 else 0
    output_bytes = max(map(_output_elements, specs)) * itemsize if num_devices > 1 else 0
    velocity_bytes = max(map(_velocity_elements, specs)) * itemsize if num_devices > 1 else 0
    versions_offset = num_devices * CACHE_LINE
    q_offset = _align(versions_offset + num_slots * CACHE_LINE, PAGE)
    query_bytes, key_bytes, output_bytes, velocity_bytes = (
        _align(num_bytes, PAGE) for num_bytes in (query_bytes, key_bytes, output_bytes, velocity_bytes)
    )
    output_offset = q_offset + query_bytes + 2 * key_bytes
    velocity_offset = output_offset + output_bytes
    slots_offset = velocity_offset + velocity_bytes
    slot_bytes = max(slot.num_bytes for slot in slots.values())
    return SlabLayout(
        num_devices=num_devices,
        num_slots=num_slots,
        itemsize=itemsize,
        counters_offset=0,
        versions_offset=versions_offset,
        q_offset=q_offset,
        k_offset=q_offset + query_bytes,
        v_offset=q_offset + query_bytes + key_bytes,
        query_bytes=query_bytes,
        key_bytes=key_bytes,
        output_offset=output_offset,
        output_bytes=output_bytes,
        velocity_offset=velocity_offset,
        velocity_bytes=velocity_bytes,
        slots_offset=slots_offset,
        slot_bytes=slot_bytes,
        slots=slots,
        num_bytes=slots_offset + num_slots * slot_bytes,
    )


def _slot_layout(spec: ModelSpec, itemsize: int) -> SlotLayout:
    places: list[FieldPlace] = []
    offset = 0
    for field in spec.fields:
        size = FP32_BYTES if field.fp32 else itemsize
        max_rows = spec.max_rows(field.rows)
        part_bytes = _align(max_rows * field.width * size, CACHE_LINE)
        places.append(FieldPlace(field=field, offset=offset, max_rows=max_rows, itemsize=size, part_bytes=part_bytes))
        assert not (field.changes and field.per_branch), f"{field.name}: all branches step the same latents"
        offset += part_bytes * (NUM_BUFFERS if field.changes else spec.max_branches if field.per_branch else 1)
    return SlotLayout(places=tuple(places), num_bytes=_align(offset, PAGE))


def scratch_elements(specs: Sequence[ModelSpec]) -> tuple[int, int]:
    """Of q, and of each of k and v, for all rows and heads of the largest model: what one device alone takes."""
    rows = [sum(map(spec.max_rows, spec.segments)) * spec.head_dim for spec in specs]
    queries = max(count * spec.num_heads for count, spec in zip(rows, specs, strict=True))
    return queries, max(count * spec.num_key_heads for count, spec in zip(rows, specs, strict=True))


def _query_elements(spec: ModelSpec) -> int:
    """Of q at degree 2."""
    return spec.heads_per_key * _key_elements(spec)


def _key_elements(spec: ModelSpec) -> int:
    """Of each of k, v at degree 2."""
    return sum(map(spec.max_rows, spec.segments)) * _half(spec.num_key_heads) * spec.head_dim


def _output_elements(spec: ModelSpec) -> int:
    """At degree 2: each segment is halved by itself."""
    return sum(_half(spec.max_rows(segment)) for segment in spec.segments) * spec.num_heads * spec.head_dim


def _velocity_elements(spec: ModelSpec) -> int:
    """Two branches on two devices have all rows each."""
    latents = spec.latents
    return spec.max_rows(latents.rows) * latents.width if spec.max_branches > 1 else 0


def _align(num_bytes: int, unit: int) -> int:
    return -(-num_bytes // unit) * unit


def _half(count: int) -> int:
    return -(-count // 2)
