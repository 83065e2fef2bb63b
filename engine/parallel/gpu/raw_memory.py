"""Tensors over memory that torch did not allocate: a peer slab, a registered host word.

Owns the views; whoever makes one keeps the memory alive as long as the view.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor


def tensor_at(address: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor over the bytes at `address`, without a copy, contiguous.

    `device`: a CUDA device with its index, for which `address` is a device pointer (of its own memory or of registered
    host memory), or the CPU.
    """
    count = torch.Size(shape).numel()
    if not count:
        return torch.empty(shape, dtype=dtype, device=device)
    num_bytes = count * dtype.itemsize
    if device.type == "cpu":
        raw = torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)
    else:
        raw = torch.as_tensor(_CudaBytes(address, num_bytes), device=device)
        assert raw.data_ptr() == address, f"{address:#x} was copied to {raw.data_ptr():#x}"
    return raw.view(dtype).view(shape)


class _CudaBytes:
    """What torch takes device memory from; bytes, because the interface has no name for bfloat16."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
