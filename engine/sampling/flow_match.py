"""Flow-match sampling as diffusers does it: noise levels, solvers as tables of coefficients, packed latents.

Owns the arithmetic between a scheduler config and the latents; knows nothing of models, groups or requests.
Sources: diffusers' FlowMatchEulerDiscreteScheduler and FluxPipeline; arXiv:2403.03206.
"""

import math
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tetrion.engine.model_spec import SchedulerSpec

Spacing = Literal["even", "even in fp32", "trained"] | tuple[float, ...]
"""Levels before they are shifted: 1 … 1/n, as pipelines that choose them do (some by torch's fp32, which rounds
otherwise), those of the scheduler itself, or those that a checkpoint lists."""


class Schedule(NamedTuple):
    """A linear solver of S steps. times: fp32 [S], what the network is told of each. coefficients: fp32 [S, K, K + 1]:
    each of the K new rows of state behind a token is a sum over the old ones and the velocity, in this order. levels:
    fp32 [S], the share of noise in the state before each."""

    times: Tensor
    coefficients: Tensor
    levels: Tensor

    def after(self, skipped_steps: int) -> "Schedule":
        """Without its first steps."""
        return Schedule(*(table[skipped_steps:] for table in self))


def sigmas(
    scheduler: SchedulerSpec,
    num_steps: int,
    num_image_tokens: int,
    spacing: Spacing = "even",
    dynamic_shift: float | None = None,
) -> NDArray[np.float32]:
    """Noise levels of `num_steps` steps, [num_steps + 1] from (near) 1 down to 0, shifted for the picture's size. A
    scheduler with `use_flow_sigmas` does not let the pipeline choose. `dynamic_shift`: in place of the one that the
    scheduler's config means for so many tokens."""
    if num_steps < 1:
        raise ValueError(f"num_steps: must be at least 1, got {num_steps}")
    levels = _levels(scheduler, num_steps, "trained" if scheduler.use_flow_sigmas else spacing)
    if dynamic_shift is None and scheduler.use_dynamic_shifting:
        dynamic_shift = _resolution_shift(scheduler, num_image_tokens)
    if not scheduler.use_dynamic_shifting:
        levels = scheduler.shift * levels / (1 + (scheduler.shift - 1) * levels)
    elif scheduler.time_shift_type == "exponential":
        assert dynamic_shift is not None
        factor = math.exp(dynamic_shift)
        levels = factor / (factor + (1 / levels - 1))
    elif scheduler.time_shift_type == "linear":
        assert dynamic_shift is not None
        factor = dynamic_shift
        levels = factor / (factor + (1 / levels - 1))
    else:
        raise ValueError(f"time_shift_type: expected exponential or linear, got {scheduler.time_shift_type!r}")
    if scheduler.shift_terminal:
        levels = _stretched(levels, scheduler.shift_terminal)
    return np.append(levels, np.float32(0)).astype(np.float32)


def _stretched(levels: NDArray[Any], last: float) -> NDArray[Any]:
    """So that the last is `last` and a level of 1 stays: a single step's stays as it is (diffusers makes it NaN)."""
    done = 1 - levels
    return levels if done[-1] <= 0 else 1 - done / (done[-1] / (1 - last))


def _levels(scheduler: SchedulerSpec, num_steps: int, spacing: Spacing) -> NDArray[Any]:
    """Before they are shifted."""
    match spacing:
        case "even":
            return np.linspace(1.0, 1 / num_steps, num_steps).astype(np.float32)
        case "even in fp32":
            return torch.linspace(1.0, 1 / num_steps, num_steps).numpy()
        case "trained":
            return _trained_levels(scheduler, num_steps)
        case listed:
            assert len(listed) == num_steps, f"{len(listed)} levels for {num_steps} steps"
            return np.array(listed).astype(np.float32)


def _trained_levels(scheduler: SchedulerSpec, num_steps: int) -> NDArray[Any]:
    """Evenly over the range of levels that the model was trained on, which a fixed shift has shifted already. What
    follows shifts them again, as diffusers' scheduler does: the last of 28 levels is 0.0089 at a shift of 3, not 0.1.
    In fp64, which is rounded at the end."""
    count = scheduler.num_train_timesteps
    ends = np.array([count, 1], np.float32) / np.float32(count)
    if not scheduler.use_dynamic_shifting:
        shift = np.float32(scheduler.shift)
        ends = shift * ends / (1 + np.float32(scheduler.shift - 1) * ends)
    first, last = (float(end) * count for end in ends)
    return np.linspace(first, last, num_steps) / count


def timesteps(scheduler: SchedulerSpec, levels: NDArray[np.float32]) -> NDArray[np.float32]:
    """The timestep at which each step queries the transformer: [num_steps], from `sigmas(...)` [num_steps + 1]."""
    return levels[:-1] * np.float32(scheduler.num_train_timesteps)


def _resolution_shift(scheduler: SchedulerSpec, num_image_tokens: int) -> float:
    """Linear in the number of image tokens, through (base_image_seq_len, base_shift) and (max_…, max_shift)."""
    slope = (scheduler.max_shift - scheduler.base_shift) / (scheduler.max_image_seq_len - scheduler.base_image_seq_len)
    return num_image_tokens * slope + (scheduler.base_shift - slope * scheduler.base_image_seq_len)


def euler_schedule(
    scheduler: SchedulerSpec,
    num_steps: int,
    num_image_tokens: int,
    spacing: Spacing = "even",
    dynamic_shift: float | None = None,
) -> Schedule:
    """Euler's method: each step adds the change of the noise level times the velocity, in fp32."""
    levels = sigmas(scheduler, num_steps, num_image_tokens, spacing, dynamic_shift)
    coefficients = torch.ones(num_steps, 1, 2)
    coefficients[:, 0, 1] = torch.from_numpy(np.diff(levels))
    return Schedule(torch.from_numpy(timesteps(scheduler, levels)), coefficients, torch.from_numpy(levels[:-1]))


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
