"""What lies in a slab, as torch tensors: views only, nothing is copied or allocated.

Owns their shapes; where the bytes are is the concern of `view`, and who may touch what when is exchange.py's.
"""

import abc

import torch
from torch import Tensor

from tetrion.engine.parallel.layout import FieldPlace, SlabLayout

DTYPES = {4: torch.float32, 2: torch.bfloat16}


class SlabTensors(abc.ABC):
    def __init__(self, layout: SlabLayout, device_id: int) -> None:
        self.layout, self.device_id = layout, device_id
        self.dtype = DTYPES[layout.itemsize]

    @abc.abstractmethod
    def view(self, device: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The bytes at `offset` of a device's slab."""

    def constants(self, device: int, model: str, slot: int, branch: int = 0) -> dict[str, Tensor]:
        """What steps do not change of a request, by field: [max rows, width] of a branch. Rows beyond the request's own
        are left over."""
        places = [place for place in self.layout.slots[model].places if not place.field.changes]
        return {
            place.field.name: self._part(device, place, slot, branch if place.field.per_branch else 0)
            for place in places
        }

    def state(self, device: int, model: str, slot: int, buffer: int) -> Tensor:
        """What steps change, in one of the slot's buffers: [max rows, width]."""
        return self._part(device, self.layout.slots[model].latents, slot, buffer)

    def qkv(
        self, device: int, num_rows: int, num_heads: int, head_dim: int, heads_per_key: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The exchange regions of `device`: q, k, v of its heads for all rows, [num_rows, num_heads, head_dim]; of k
        and v [num_rows, num_heads / heads_per_key, head_dim]."""
        layout = self.layout
        queries, keys = (num_rows, num_heads, head_dim), (num_rows, num_heads // heads_per_key, head_dim)
        self._check_fits(queries, layout.query_bytes)
        self._check_fits(keys, layout.key_bytes)
        places = (layout.q_offset, queries), (layout.k_offset, keys), (layout.v_offset, keys)
        q, k, v = (self.view(device, offset, shape, self.dtype) for offset, shape in places)
        return q, k, v

    def output(self, device: int, num_rows: int, num_heads: int, head_dim: int) -> Tensor:
        """The output region of `device`: all heads of its own rows, [num_rows, num_heads, head_dim]."""
        shape = (num_rows, num_heads, head_dim)
        self._check_fits(shape, self.layout.output_bytes)
        return self.view(device, self.layout.output_offset, shape, self.dtype)

    def velocity(self, device: int, num_rows: int, width: int) -> Tensor:
        """The velocity region of `device`: [num_rows, width]."""
        self._check_fits((num_rows, width), self.layout.velocity_bytes)
        return self.view(device, self.layout.velocity_offset, (num_rows, width), self.dtype)

    def _part(self, device: int, place: FieldPlace, slot: int, part: int) -> Tensor:
        piece = place.piece(place.max_rows, part)
        shape, dtype = (place.max_rows, place.field.width), torch.float32 if place.field.fp32 else self.dtype
        return self.view(device, self.layout.slot_offset(slot) + piece.offset, shape, dtype)

    def _check_fits(self, shape: tuple[int, ...], num_bytes: int) -> None:
        wanted = torch.Size(shape).numel() * self.layout.itemsize
        assert wanted <= num_bytes, f"{shape} takes {wanted} bytes of a region of {num_bytes}"
