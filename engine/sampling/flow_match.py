"""Flow-match Euler sampling as diffusers' FluxPipeline does it: noise levels, starting noise, the Euler step.

Owns the arithmetic between a scheduler config and the latents; knows nothing of models, groups or requests.
Sources: diffusers' FlowMatchEulerDiscreteScheduler and FluxPipeline; arXiv:2403.03206.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tetrion.engine.model_spec import ModelSpec, SchedulerSpec


def sigmas(scheduler: SchedulerSpec, num_steps: int, num_image_tokens: int) -> NDArray[np.float32]:
    """Noise levels of `num_steps` steps, [num_steps + 1] from (near) 1 down to 0, shifted for the picture's size."""
    if num_steps < 1:
        raise ValueError(f"num_steps: must be at least 1, got {num_steps}")
    levels: NDArray[Any] = np.linspace(1.0, 1 / num_steps, num_steps).astype(np.float32)
    if not scheduler.use_dynamic_shifting:
        levels = scheduler.shift * levels / (1 + (scheduler.shift - 1) * levels)
    elif scheduler.time_shift_type == "exponential":
        factor = math.exp(_resolution_shift(scheduler, num_image_tokens))
        levels = factor / (factor + (1 / levels - 1))
    elif scheduler.time_shift_type == "linear":
        factor = _resolution_shift(scheduler, num_image_tokens)
        levels = factor / (factor + (1 / levels - 1))
    else:
        raise ValueError(f"time_shift_type: expected exponential or linear, got {scheduler.time_shift_type!r}")
    return np.append(levels, np.float32(0)).astype(np.float32)


def timesteps(scheduler: SchedulerSpec, levels: NDArray[np.float32]) -> NDArray[np.float32]:
    """The timestep at which each step queries the transformer: [num_steps], from `sigmas(...)` [num_steps + 1]."""
    return levels[:-1] * np.float32(scheduler.num_train_timesteps)


def _resolution_shift(scheduler: SchedulerSpec, num_image_tokens: int) -> float:
    """Linear in the number of image tokens, through (base_image_seq_len, base_shift) and (max_…, max_shift)."""
    slope = (scheduler.max_shift - scheduler.base_shift) / (scheduler.max_image_seq_len - scheduler.base_image_seq_len)
    return num_image_tokens * slope + (scheduler.base_shift - slope * scheduler.base_image_seq_len)


def euler_step(latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """latents + (sigma_next − sigma) · velocity, in fp32; the levels are float32 values of `sigmas(...)`."""
    delta = float(np.float32(sigma_next) - np.float32(sigma))
    return latents + delta * velocity


def initial_noise(seed: int, width: int, height: int, spec: ModelSpec) -> Tensor:
    """Starting latents of a picture of `width` × `height` pixels: packed [tokens, in_channels], fp32.

    Drawn by a CPU generator whatever the device, so that a seed means the same picture everywhere.
    """
    rows, columns = 2 * (height // spec.sizes.multiple), 2 * (width // spec.sizes.multiple)
    generator = torch.Generator("cpu").manual_seed(seed)
    noise_CHW = torch.randn((1, spec.in_channels // 4, rows, columns), generator=generator, dtype=torch.float32)[0]
    return pack_latents(noise_CHW)


def pack_latents(latents_CHW: Tensor) -> Tensor:
    """[C, H, W] -> [H/2 · W/2, 4·C]: one token per 2 × 2 latent pixels, channel-major within a token."""
    channels, rows, columns = latents_CHW.shape
    blocks = latents_CHW.reshape(channels, rows // 2, 2, columns // 2, 2)
    return blocks.permute(1, 3, 0, 2, 4).reshape((rows // 2) * (columns // 2), 4 * channels)


def unpack_latents(latents: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack_latents`: [rows · columns, 4·C] -> [C, 2·rows, 2·columns]; sizes in tokens."""
    channels = latents.shape[1] // 4
    blocks = latents.reshape(rows, columns, channels, 2, 2)
    return blocks.permute(2, 0, 3, 1, 4).reshape(channels, 2 * rows, 2 * columns)
