"""Where everything lies in shared memory: one peer slab per device, and one control segment owned by the engine.

Owns byte offsets and nothing else; knows no torch, no processes, no groups. A slab, offsets ascending:

    ┌ counters   num_devices cache lines: word `s` is written by device `s` alone (barrier.py)
    ├ versions   num_slots cache lines: version, sequence and state of each slot, written by the slab's owner alone
    ├ q, k, v    [text + image tokens, local heads, head_dim] each, in canonical token order: all text, then all image
    ├ output     [local tokens, num_heads * head_dim]: attention output of this device's own tokens
    └ slots      num_slots × { text [max_text_tokens, text_dim], pooled [pooled_dim], latents [max_image_tokens, C] }

Counters are 32 bits wide, because a futex waits on 32-bit words; they wrap, and are compared so that this is harmless.
Exchange regions are sized for degree 2, the widest shard that is ever exchanged; one device alone has none.
"""

import msgspec

from tetrion.engine.model_spec import ModelSpec

CACHE_LINE = 64
PAGE = 4096
LATENTS_ITEMSIZE = 4


class ControlLayout(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's control segment: one 32-bit abort word per device, each on its own cache line."""

    num_devices: int

    @property
    def num_bytes(self) -> int:
        return _align(self.num_devices * CACHE_LINE, PAGE)

    def abort_offset(self, device: int) -> int:
        assert 0 <= device < self.num_devices, f"device {device} of {self.num_devices}"
        return device * CACHE_LINE


class SlabLayout(msgspec.Struct, frozen=True, kw_only=True):
    """Byte offsets of one slab (all devices' slabs are alike). `*_bytes` of regions and slots are rounded up to pages.

    `itemsize` is the size in bytes of one element of every tensor but the latents: 4 (fp32) or 2 (bf16). Latents are
    fp32 always: they are summed over all steps.
    """

    num_devices: int
    num_slots: int
    itemsize: int
    max_text_tokens: int
    max_image_tokens: int
    text_dim: int
    pooled_dim: int
    in_channels: int
    counters_offset: int
    versions_offset: int
    q_offset: int
    k_offset: int
    v_offset: int
    exchange_bytes: int
    output_offset: int
    output_bytes: int
    slots_offset: int
    slot_bytes: int
    pooled_in_slot: int
    latents_in_slot: int
    num_bytes: int

    def counter_offset(self, sender: int) -> int:
        """The counter in this slab that device `sender` writes."""
        assert 0 <= sender < self.num_devices, f"device {sender} of {self.num_devices}"
        return self.counters_offset + sender * CACHE_LINE

    def version_offset(self, slot: int) -> int:
        """64-bit version, followed by its 32-bit sequence; GPUs add the state's number, 64 bits, 16 bytes on."""
        assert 0 <= slot < self.num_slots, f"slot {slot} of {self.num_slots}"
        return self.versions_offset + slot * CACHE_LINE

    def text_offset(self, slot: int) -> int:
        assert 0 <= slot < self.num_slots, f"slot {slot} of {self.num_slots}"
        return self.slots_offset + slot * self.slot_bytes

    def pooled_offset(self, slot: int) -> int:
        return self.text_offset(slot) + self.pooled_in_slot

    def latents_offset(self, slot: int) -> int:
        return self.text_offset(slot) + self.latents_in_slot


def slab_layout(spec: ModelSpec, num_devices: int, num_slots: int, itemsize: int = 4) -> SlabLayout:
    """The layout for a model. Raises ValueError for counts below 1 or an element size other than 2 or 4 bytes."""
    if num_devices < 1 or num_slots < 1:
        raise ValueError(f"a slab needs at least 1 device and 1 slot, got {num_devices} and {num_slots}")
    if itemsize not in (2, 4):
        raise ValueError(f"slab elements are 2 or 4 bytes wide, got {itemsize}")
    num_text, num_image = spec.max_text_tokens, spec.max_image_tokens
    tokens, heads, row = num_text + num_image, _half(spec.num_heads), spec.num_heads * spec.head_dim
    shared = num_devices > 1
    exchange_bytes = _align(tokens * heads * spec.head_dim * itemsize, PAGE) if shared else 0
    output_bytes = _align((_half(num_text) + _half(num_image)) * row * itemsize, PAGE) if shared else 0
    versions_offset = num_devices * CACHE_LINE
    q_offset = _align(versions_offset + num_slots * CACHE_LINE, PAGE)
    output_offset = q_offset + 3 * exchange_bytes
    slots_offset = output_offset + output_bytes
    pooled_in_slot = _align(num_text * spec.text_dim * itemsize, CACHE_LINE)
    latents_in_slot = pooled_in_slot + _align(spec.pooled_dim * itemsize, CACHE_LINE)
    slot_bytes = _align(latents_in_slot + num_image * spec.in_channels * LATENTS_ITEMSIZE, PAGE)
    return SlabLayout(
        num_devices=num_devices,
        num_slots=num_slots,
        itemsize=itemsize,
        max_text_tokens=num_text,
        max_image_tokens=num_image,
        text_dim=spec.text_dim,
        pooled_dim=spec.pooled_dim,
        in_channels=spec.in_channels,
        counters_offset=0,
        versions_offset=versions_offset,
        q_offset=q_offset,
        k_offset=q_offset + exchange_bytes,
        v_offset=q_offset + 2 * exchange_bytes,
        exchange_bytes=exchange_bytes,
        output_offset=output_offset,
        output_bytes=output_bytes,
        slots_offset=slots_offset,
        slot_bytes=slot_bytes,
        pooled_in_slot=pooled_in_slot,
        latents_in_slot=latents_in_slot,
        num_bytes=slots_offset + num_slots * slot_bytes,
    )


def _align(num_bytes: int, unit: int) -> int:
    return -(-num_bytes // unit) * unit


def _half(count: int) -> int:
    return -(-count // 2)
