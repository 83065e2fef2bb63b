"""What diffusers' transformers are called with in one denoising step, by the class that their config.json names.

Random values at the real shapes. A family of models that is to be timed beside Tetrion has its function here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

TIMESTEP = 500.0
Random = Callable[..., Tensor]
"""`random(*shape)`, on the transformer's device and in its dtype."""


class StepInputs(NamedTuple):
    """`latents`: of one picture, as the transformer takes them. `others`: its further arguments, with a row for each
    guidance branch, which diffusers evaluates as one batch."""

    latents: Tensor
    others: dict[str, object]


class StepSize(NamedTuple):
    """Tokens of one picture, and guidance branches."""

    num_text: int
    width: int
    height: int
    num_branches: int


def flux(config: Any, size: StepSize, random: Random) -> StepInputs:
    latents = random(1, size.width * size.height, config.in_channels)
    device, batch = latents.device, size.num_branches
    ids = torch.zeros(size.height, size.width, 3, device=device)
    ids[..., 1] = torch.arange(size.height, device=device)[:, None]
    ids[..., 2] = torch.arange(size.width, device=device)[None]
    return StepInputs(
        latents,
        {
            "encoder_hidden_states": random(batch, size.num_text, config.joint_attention_dim),
            "pooled_projections": random(batch, config.pooled_projection_dim),
            "timestep": torch.full((batch,), TIMESTEP / 1000, device=device, dtype=latents.dtype),
            "guidance": torch.full((batch,), 3.5, device=device) if config.guidance_embeds else None,
            "img_ids": ids.view(-1, 3),
            "txt_ids": torch.zeros(size.num_text, 3, device=device),
        },
    )


def sd3(config: Any, size: StepSize, random: Random) -> StepInputs:
    patch, batch = config.patch_size, size.num_branches
    latents = random(1, config.in_channels, patch * size.height, patch * size.width)
    return StepInputs(
        latents,
        {
            "encoder_hidden_states": random(batch, size.num_text, config.joint_attention_dim),
            "pooled_projections": random(batch, config.pooled_projection_dim),
            "timestep": torch.full((batch,), TIMESTEP, device=latents.device),
        },
    )


INPUTS: dict[str, Callable[[Any, StepSize, Random], StepInputs]] = {
    "FluxTransformer2DModel": flux,
    "SD3Transformer2DModel": sd3,
}
