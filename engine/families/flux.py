"""FLUX.1, for the engine: dev, schnell, and what was trained like them.

Without a preset FLUX.1-dev's own defaults hold, or FLUX.1-schnell's if the model takes no guidance.
"""

from pathlib import Path

import msgspec

from tetrion.engine.config import LoadFormat
from tetrion.engine.errors import RequestError
from tetrion.engine.families.base import Family
from tetrion.engine.families.checkpoint import (
    SCHEDULER_FILE,
    Preset,
    check_complete,
    model_name,
    read_config,
    read_preset,
    read_scheduler,
)
from tetrion.engine.model_spec import ModelSpec, Sizes, SlotField
from tetrion.engine.request import ImageRequest
from tetrion.engine.shape import StepShape

WITH_WEIGHTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
CONFIGS = (SCHEDULER_FILE, *(f"{component}/config.json" for component in WITH_WEIGHTS))
TOKENIZERS = ("tokenizer", "tokenizer_2")
SCHNELL = Preset(num_steps=4, guidance=None, max_text_tokens=256)
LATENTS_PER_ROW = 2
"""A row of the image segment covers 2 × 2 latent pixels."""


class TransformerConfig(msgspec.Struct, frozen=True, kw_only=True):
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    pooled_projection_dim: int
    guidance_embeds: bool = False


class VaeConfig(msgspec.Struct, frozen=True, kw_only=True):
    block_out_channels: list[int]

    @property
    def scale_factor(self) -> int:
        """Pixels a latent pixel's side."""
        return 2 ** (len(self.block_out_channels) - 1)


class Flux:
    def read(self, folder: Path, load_format: LoadFormat) -> ModelSpec:
        check_complete(folder, load_format, configs=CONFIGS, tokenizers=TOKENIZERS, with_weights=WITH_WEIGHTS)
        scheduler = read_scheduler(folder)
        transformer = read_config(folder, "transformer/config.json", TransformerConfig, "FluxTransformer2DModel")
        vae = read_config(folder, "vae/config.json", VaeConfig, "AutoencoderKL")
        preset = read_preset(folder, Preset() if transformer.guidance_embeds else SCHNELL)
        row = transformer.num_attention_heads * transformer.attention_head_dim
        return ModelSpec(
            name=model_name(folder, preset),
            path=str(folder.resolve()),
            family="flux",
            num_heads=transformer.num_attention_heads,
            head_dim=transformer.attention_head_dim,
            segments=("text", "image"),
            fields=(
                SlotField(name="text", rows="text", width=row, per_branch=True),
                SlotField(name="pooled", rows="one", width=transformer.pooled_projection_dim, per_branch=True),
                SlotField(name="latents", rows="image", width=transformer.in_channels, fp32=True, changes=True),
            ),
            max_branches=2,
            scheduler=scheduler,
            num_steps=preset.num_steps,
            guidance=preset.guidance or 0.0,
            max_text_tokens=preset.max_text_tokens,
            sizes=Sizes(
                min=preset.min_size,
                max=preset.max_size,
                multiple=LATENTS_PER_ROW * vae.scale_factor,
                default=(preset.default_width, preset.default_height),
            ),
            inputs=frozenset({"negative_prompt", "true_cfg_scale"}),
        )

    def check(self, spec: ModelSpec, request: ImageRequest) -> None:
        """Guidance by a second branch takes both a prompt and a scale, as in diffusers' FluxPipeline."""
        if request.negative_prompt is not None and not _has_scale(request):
            raise RequestError("negative_prompt", "takes a true_cfg_scale above 1 to go with it")
        if _has_scale(request) and request.negative_prompt is None:
            raise RequestError("true_cfg_scale", "above 1 takes a negative_prompt to go with it")

    def shape(self, spec: ModelSpec, request: ImageRequest) -> StepShape:
        assert request.width is not None and request.height is not None
        return spec.shape(request.width, request.height, 2 if _has_scale(request) else 1)


def _has_scale(request: ImageRequest) -> bool:
    return request.true_cfg_scale is not None and request.true_cfg_scale > 1


FAMILY: Family = Flux()
