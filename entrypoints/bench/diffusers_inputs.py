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
    """`latents`: of one picture, as the transformer takes them, by the argument `name`; a list of them where it
    `takes_list`. `others`: its further arguments, with a row for each guidance branch, which diffusers evaluates as one
    batch."""

    latents: Tensor
    others: dict[str, object]
    name: str = "hidden_states"
    takes_list: bool = False


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


def flux2(config: Any, size: StepSize, random: Random) -> StepInputs:
    latents = random(1, size.width * size.height, config.in_channels)
    device, batch = latents.device, size.num_branches
    rows, columns, text = (torch.arange(count, device=device) for count in (size.height, size.width, size.num_text))
    image_ids, text_ids = (torch.zeros(count, 4, device=device) for count in (latents.shape[1], size.num_text))
    image_ids[:, 1:3], text_ids[:, 3] = torch.cartesian_prod(rows, columns), text
    return StepInputs(
        latents,
        {
            "encoder_hidden_states": random(batch, size.num_text, config.joint_attention_dim),
            "timestep": torch.full((batch,), TIMESTEP / 1000, device=device, dtype=latents.dtype),
            "guidance": torch.full((batch,), 4.0, device=device) if config.guidance_embeds else None,
            "img_ids": image_ids,
            "txt_ids": text_ids,
        },
    )


def zimage(config: Any, size: StepSize, random: Random) -> StepInputs:
    latents = random(1, config.in_channels, 1, 2 * size.height, 2 * size.width)
    times = torch.full((size.num_branches,), 1 - TIMESTEP / 1000, device=latents.device)
    texts = [random(size.num_text, config.cap_feat_dim) for _ in range(size.num_branches)]
    return StepInputs(latents, {"t": times, "cap_feats": texts}, "x", takes_list=True)


def qwen_image(config: Any, size: StepSize, random: Random) -> StepInputs:
    latents, batch = random(1, size.width * size.height, config.in_channels), size.num_branches
    return StepInputs(
        latents,
        {
            "encoder_hidden_states": random(batch, size.num_text, config.joint_attention_dim),
            "timestep": torch.full((batch,), TIMESTEP / 1000, device=latents.device, dtype=latents.dtype),
            "img_shapes": [[(1, size.height, size.width)]] * batch,
        },
    )


INPUTS: dict[str, Callable[[Any, StepSize, Random], StepInputs]] = {
    "FluxTransformer2DModel": flux,
    "SD3Transformer2DModel": sd3,
    "Flux2Transformer2DModel": flux2,
    "ZImageTransformer2DModel": zimage,
    "QwenImageTransformer2DModel": qwen_image,
}
