"""Which attention runs, cuDNN's or our Triton kernel: the operator's choice, or by what was measured.

Owns the choice. Left to itself it depends on head dim and dtype, and on nothing else: a choice by the number of heads
would let the degree show in a picture's bits (the two round differently).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tetrion.kernels.attention import attention

Choice = Literal["auto", "triton", "cudnn"]
Backend = Literal["triton", "cudnn"]
CUDNN_DTYPES = (torch.bfloat16, torch.float16)
CUDNN_HEAD_DIMS = (32, 64, 128)
"""Where cuDNN was measured, and at every length the faster one (H100, 512 to 16,896 tokens)."""


def backend_for(choice: Choice, head_dim: int, dtype: torch.dtype, device_type: str) -> Backend:
    """Raises ValueError if cuDNN is wanted for what it cannot do: fp32, or a device without CUDA."""
    can = device_type == "cuda" and dtype in CUDNN_DTYPES
    if choice == "cudnn" and not can:
        raise ValueError(f"attention: cudnn needs 16-bit elements on a GPU, not {dtype} on {device_type}")
    if choice == "auto":
        return "cudnn" if can and head_dim in CUDNN_HEAD_DIMS else "triton"
    return choice


def attend(q: Tensor, k: Tensor, v: Tensor, choice: Choice = "auto") -> Tensor:
    """softmax(q kᵀ / √D) v per head: [L, h, D] each, as `attention` takes them, and so the result (D contiguous). Of k
    and v there may be fewer heads."""
    if backend_for(choice, q.shape[2], q.dtype, q.device.type) == "triton":
        return attention(q, k, v)
    q_1hLD, k_1hLD, v_1hLD = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        grouped = k.shape[1] != q.shape[1]
        out_1hLD = F.scaled_dot_product_attention(q_1hLD, k_1hLD, v_1hLD, enable_gqa=grouped)
        return out_1hLD.squeeze(0).transpose(0, 1)
