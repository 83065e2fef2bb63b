"""All devices' slabs as torch tensors over shared memory: views only, nothing is copied or allocated.

Owns the shapes of what lies in a slab; knows no groups and no barriers: who may touch what when is exchange.py's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tetrion.engine.parallel.layout import SlabLayout
from tetrion.engine.parallel.words import SlotVersion, Waiter, platform_waiter

DTYPES = {4: torch.float32, 2: torch.bfloat16}


class SlotState:
    """A request's state in one slot of one slab.

    `text`: prompt embeddings [max_text_tokens, text_dim]; `pooled`: [pooled_dim]; `latents`: [max_image_tokens, C],
    all packed image tokens, fp32. Rows beyond the request's own counts are left over from others.
    """

    def __init__(self, text: Tensor, pooled: Tensor, latents: Tensor, version: SlotVersion) -> None:
        self.text = text
        self.pooled = pooled
        self.latents = latents
        self._version = version

    @property
    def version(self) -> int:
        return self._version.load()

    @version.setter
    def version(self, value: int) -> None:
        """Write it after the tensors, and only on the device that owns the slab."""
        self._version.store(value)


class SharedSlabs:
    """`buffers[d]`: device d's whole slab, writable, mapped into this process."""

    def __init__(
        self,
        layout: SlabLayout,
        device_id: int,
        buffers: Sequence[memoryview],
        *,
        waiter: Waiter | None = None,
    ) -> None:
        assert len(buffers) == layout.num_devices, f"{len(buffers)} slabs for {layout.num_devices} devices"
        assert all(buffer.nbytes >= layout.num_bytes for buffer in buffers), f"slabs need {layout.num_bytes} bytes"
        self.layout = layout
        self.device_id = device_id
        self.dtype = DTYPES[layout.itemsize]
        self._buffers = [buffer.cast("B") for buffer in buffers]
        self._waiter = platform_waiter() if waiter is None else waiter

    def slot(self, device: int, slot: int) -> SlotState:
        layout = self.layout
        latents_shape = (layout.max_image_tokens, layout.in_channels)
        return SlotState(
            text=self._view(device, layout.text_offset(slot), (layout.max_text_tokens, layout.text_dim)),
            pooled=self._view(device, layout.pooled_offset(slot), (layout.pooled_dim,)),
            latents=self._view(device, layout.latents_offset(slot), latents_shape, torch.float32),
            version=SlotVersion(self._buffers[device], layout.version_offset(slot), self._waiter),
        )

    def qkv(self, device: int, num_tokens: int, num_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """The exchange regions of `device`: q, k, v of its heads for all tokens, [num_tokens, num_heads, head_dim]."""
        shape = (num_tokens, num_heads, head_dim)
        self._check_fits(shape, self.layout.exchange_bytes)
        offsets = self.layout.q_offset, self.layout.k_offset, self.layout.v_offset
        q, k, v = (self._view(device, offset, shape) for offset in offsets)
        return q, k, v

    def output(self, device: int, num_tokens: int, num_heads: int, head_dim: int) -> Tensor:
        """The output region of `device`: all heads of its own tokens, [num_tokens, num_heads, head_dim]."""
        shape = (num_tokens, num_heads, head_dim)
        self._check_fits(shape, self.layout.output_bytes)
        return self._view(device, self.layout.output_offset, shape)

    def _view(self, device: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        count, dtype = torch.Size(shape).numel(), dtype or self.dtype
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._buffers[device], dtype=dtype, count=count, offset=offset).view(shape)

    def _check_fits(self, shape: tuple[int, ...], num_bytes: int) -> None:
        wanted = torch.Size(shape).numel() * self.layout.itemsize
        assert wanted <= num_bytes, f"{shape} takes {wanted} bytes of a region of {num_bytes}"
