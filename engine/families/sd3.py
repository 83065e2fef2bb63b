"""Stable Diffusion 3 and 3.5, for the engine: medium and large, with or without a T5.

Without a preset the model cards' guidance holds, of the version that the transformer's config tells: 3.0 norms neither
q nor k, 3.5-medium alone has blocks with a second attention. What is distilled (3.5-large-turbo) has the same config as
3.5-large: its folder needs a preset.

Text is both CLIPs' rows side by side and T5's below them; a checkpoint without a T5 has as many rows of zeros.
"""

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from tetrion.engine.config import LoadFormat
from tetrion.engine.errors import RequestError
from tetrion.engine.families.base import Family
from tetrion.engine.families.checkpoint import (
    INDEX_FILE,
    PRESET_FILE,
    SCHEDULER_FILE,
    TOKENIZER_CONFIG,
    Preset,
    check_complete,
    component_folder,
    has_tokenizer,
    model_name,
    read_config,
    read_json,
    read_preset,
    read_scheduler,
)
from tetrion.engine.model_spec import CheckpointError, ModelSpec, Sizes, SlotField
from tetrion.engine.request import ImageRequest
from tetrion.engine.shape import StepShape

CLIPS, T5 = ("text_encoder", "text_encoder_2"), "text_encoder_3"
TOKENIZER_OF = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}
V3_MEDIUM = Preset(guidance=7.0, max_text_tokens=256)
"""`max_text_tokens`: T5's alone, here and in a preset file."""
V35_MEDIUM = Preset(guidance=4.5, max_text_tokens=256)
V35_LARGE = Preset(guidance=3.5, max_text_tokens=256)
LATENTS_PER_ROW = 2
"""A row of the image segment covers 2 × 2 latent pixels."""
_Size = Annotated[int, Meta(ge=1, le=1_000_000)]
_Side = Annotated[int, Meta(ge=1, le=4096)]


class TransformerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`pos_embed_max_size`: the longest side of a picture, in rows of the image segment."""

    num_attention_heads: _Size
    attention_head_dim: _Size
    in_channels: _Size
    joint_attention_dim: _Size
    pooled_projection_dim: _Size
    pos_embed_max_size: _Side
    sample_size: _Side = 128
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    @property
    def preset(self) -> Preset:
        if self.qk_norm is None:
            return V3_MEDIUM
        return V35_MEDIUM if self.dual_attention_layers else V35_LARGE


class VaeConfig(msgspec.Struct, frozen=True, kw_only=True):
    block_out_channels: Annotated[tuple[int, ...], Meta(min_length=1, max_length=10)]

    @property
    def scale_factor(self) -> int:
        """Pixels a latent pixel's side."""
        return 2 ** (len(self.block_out_channels) - 1)


class Sd3:
    def read(self, folder: Path, load_format: LoadFormat) -> ModelSpec:
        encoders = (*CLIPS, T5) if has_t5(folder) else CLIPS
        with_weights = ("transformer", "vae", *encoders)
        check_complete(
            folder,
            load_format,
            configs=(SCHEDULER_FILE, *(f"{component}/config.json" for component in with_weights)),
            tokenizers=[TOKENIZER_OF[encoder] for encoder in encoders],
            with_weights=with_weights,
        )
        scheduler = read_scheduler(folder)
        transformer = read_config(folder, "transformer/config.json", TransformerConfig, "SD3Transformer2DModel")
        vae = read_config(folder, "vae/config.json", VaeConfig, "AutoencoderKL")
        sizes, preset = _limits(folder, transformer, LATENTS_PER_ROW * vae.scale_factor)
        row = transformer.num_attention_heads * transformer.attention_head_dim
        return ModelSpec(
            name=model_name(folder, preset),
            path=str(folder.resolve()),
            family="sd3",
            num_heads=transformer.num_attention_heads,
            head_dim=transformer.attention_head_dim,
            segments=("text", "image"),
            fields=(
                SlotField(name="text", rows="text", width=row, per_branch=True),
                SlotField(name="pooled", rows="one", width=transformer.pooled_projection_dim, per_branch=True),
                SlotField(
                    name="latents",
                    rows="image",
                    width=LATENTS_PER_ROW**2 * transformer.in_channels,
                    fp32=True,
                    changes=True,
                ),
            ),
            max_branches=2,
            scheduler=scheduler,
            num_steps=preset.num_steps,
            guidance=preset.guidance or 0.0,
            max_text_tokens=_num_clip_rows(folder) + preset.max_text_tokens,
            sizes=sizes,
            inputs=frozenset({"negative_prompt"}),
        )

    def check(self, spec: ModelSpec, request: ImageRequest) -> None:
        """A negative prompt that nothing would look at is refused."""
        if request.negative_prompt is not None and not _is_guided(request):
            raise RequestError("negative_prompt", "takes a guidance above 1 to go with it")

    def shape(self, spec: ModelSpec, request: ImageRequest) -> StepShape:
        """Guidance up to 1 is none, as in diffusers' StableDiffusion3Pipeline."""
        assert request.width is not None and request.height is not None
        return spec.shape(request.width, request.height, 2 if _is_guided(request) else 1)


def has_t5(folder: Path) -> bool:
    """Whether the checkpoint has a third text encoder. Raises CheckpointError."""
    entry = read_json(folder, INDEX_FILE).get(T5)
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def _is_guided(request: ImageRequest) -> bool:
    assert request.guidance is not None
    return request.guidance > 1


def _limits(folder: Path, transformer: TransformerConfig, multiple: int) -> tuple[Sizes, Preset]:
    """Pictures that the table of positions covers, and the preset that holds. Raises CheckpointError."""
    longest, native = transformer.pos_embed_max_size * multiple, transformer.sample_size * multiple // LATENTS_PER_ROW
    largest = min(Preset().max_size, longest)
    default = msgspec.structs.replace(
        transformer.preset,
        max_size=largest,
        default_width=min(native, largest),
        default_height=min(native, largest),
    )
    preset = read_preset(folder, default)
    if preset.max_size > longest:
        raise CheckpointError(
            f"model: {str(folder / PRESET_FILE)!r}: max_size {preset.max_size} is beyond the {longest} pixels of"
            f" pos_embed_max_size {transformer.pos_embed_max_size}"
        )
    default_size = preset.default_width, preset.default_height
    return Sizes(min=preset.min_size, max=preset.max_size, multiple=multiple, default=default_size), preset


def _num_clip_rows(folder: Path) -> int:
    """As long as the first CLIP's tokenizer makes all prompts; where there is none (`dummy`), all that CLIP takes."""
    if has_tokenizer(component_folder(folder, "tokenizer")):
        name, field = f"tokenizer/{TOKENIZER_CONFIG}", "model_max_length"
    else:
        name, field = "text_encoder/config.json", "max_position_embeddings"
    length = read_json(folder, name).get(field, 77)
    if not isinstance(length, int) or not 1 <= length <= 4096:
        raise CheckpointError(f"model: {str(folder)!r}: {name}: {field} must be 1 … 4096, got {length!r}")
    return length


FAMILY: Family = Sd3()
