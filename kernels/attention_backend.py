"""Which attention runs: cuDNN's or our Triton kernel, by a measured table.

Owns the choice. It may depend on token count, head dim and dtype, and on nothing else: a choice by the number of heads
would let the degree show in a picture's bits (the two round differently).
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tetrion.kernels.attention import attention

Backend = Literal["cudnn", "triton"]
HALF_PRECISION = (torch.bfloat16, torch.float16)
NO_LIMIT = 1 << 31


class Row(NamedTuple):
    """`backend` serves 16-bit elements of `head_dim` up to `max_tokens`."""

    head_dim: int
    max_tokens: int
    backend: Backend


TABLE = (
    Row(128, NO_LIMIT, "cudnn"),
    Row(64, NO_LIMIT, "cudnn"),
    Row(32, NO_LIMIT, "cudnn"),
)
"""Until a GPU's own figures say otherwise: cuDNN was the faster one at every shape measured on an H100."""


def backend_for(num_tokens: int, head_dim: int, dtype: torch.dtype, device_type: str) -> Backend:
    """What serves a shape. Our kernel takes fp32, and everything that is not on a GPU (Triton's interpreter)."""
    if device_type != "cuda" or dtype not in HALF_PRECISION:
        return "triton"
    rows = [row for row in TABLE if row.head_dim == head_dim and num_tokens <= row.max_tokens]
    return min(rows, key=lambda row: row.max_tokens).backend if rows else "triton"


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v per head: [L, h, D] each, as `attention` takes them, and so the result (D contiguous)."""
    num_tokens, _, head_dim = q.shape
    if backend_for(num_tokens, head_dim, q.dtype, q.device.type) == "triton":
        return attention(q, k, v)
    q_1hLD, k_1hLD, v_1hLD = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q_1hLD, k_1hLD, v_1hLD).squeeze(0).transpose(0, 1)
