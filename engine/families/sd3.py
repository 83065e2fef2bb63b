"""Stable Diffusion 3 and 3.5 as the engine knows them: limits and defaults of a checkpoint, read from its JSON files.

Shapes: text is both CLIPs' rows side by side, then T5's below them; there are as many rows for T5 without a T5.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from tetrion.engine import model_spec as checkpoints
from tetrion.engine.config import LoadFormat
from tetrion.engine.model_spec import CheckpointError, ModelSpec, Preset, SchedulerSpec

PIPELINE = "StableDiffusion3Pipeline"
CLIPS = ("text_encoder", "text_encoder_2")
T5 = "text_encoder_3"
PATCH_SIZE = 2
MEDIUM = Preset(guidance=7.0, max_text_tokens=256)
"""`max_text_tokens`: T5's, here and in a preset file."""
LARGE_35 = Preset(guidance=3.5, max_text_tokens=256)
MEDIUM_35 = Preset(guidance=4.5, max_text_tokens=256)
ConfigT = TypeVar("ConfigT")
_Size = Annotated[int, Meta(ge=1, le=1_000_000)]
_Side = Annotated[int, Meta(ge=1, le=4096)]


class _Transformer(msgspec.Struct, kw_only=True):
    """Of `transformer/config.json`."""

    class_name: Literal["SD3Transformer2DModel"] = msgspec.field(name="_class_name")
    in_channels: _Size
    num_attention_heads: _Size
    attention_head_dim: _Size
    joint_attention_dim: _Size
    pooled_projection_dim: _Size
    pos_embed_max_size: _Side
    sample_size: _Side = 128
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    @property
    def preset(self) -> Preset:
        """The model cards' guidance. 3.0 norms neither q nor k, 3.5-medium alone has second attentions. What is
        distilled (3.5-large-turbo) has the same config: its folder needs a preset file."""
        if self.qk_norm is None:
            return MEDIUM
        return MEDIUM_35 if self.dual_attention_layers else LARGE_35


class _Vae(msgspec.Struct, kw_only=True):
    block_out_channels: Annotated[tuple[int, ...], Meta(min_length=1, max_length=10)]


class _Clip(msgspec.Struct, kw_only=True):
    max_position_embeddings: _Side = 77


class _Tokenizer(msgspec.Struct, kw_only=True):
    model_max_length: _Side = 77


def has_t5(folder: Path) -> bool:
    """Whether the checkpoint has a third text encoder. Raises CheckpointError."""
    return checkpoints._read_json(folder, "model_index.json").get(T5, [None])[0] is not None


def read(folder: Path, load_format: LoadFormat = "safetensors") -> ModelSpec:
    """Raises CheckpointError naming the first thing that is missing or not supported."""
    encoders = (*CLIPS, T5) if has_t5(folder) else CLIPS
    _check_files(folder, encoders, load_format)
    scheduler = checkpoints._read_json(folder, "scheduler/scheduler_config.json")
    checkpoints._check_scheduler(scheduler)
    transformer = _decode(folder / "transformer" / "config.json", _Transformer)
    vae = _decode(folder / "vae" / "config.json", _Vae)
    vae_scale_factor = 2 ** (len(vae.block_out_channels) - 1)
    longest = transformer.pos_embed_max_size * PATCH_SIZE * vae_scale_factor
    preset = checkpoints.read_preset(folder, _default(transformer, vae_scale_factor, longest))
    if preset.max_size > longest:
        raise CheckpointError(
            f"model: {str(folder)!r}: max_size {preset.max_size} is more than the {longest} pixels of"
            f" pos_embed_max_size {transformer.pos_embed_max_size}"
        )
    return ModelSpec(
        name=preset.name or checkpoints._folder_name(folder.resolve()),
        path=str(folder.resolve()),
        architecture="sd3",
        num_heads=transformer.num_attention_heads,
        head_dim=transformer.attention_head_dim,
        in_channels=PATCH_SIZE**2 * transformer.in_channels,
        text_dim=transformer.joint_attention_dim,
        pooled_dim=transformer.pooled_projection_dim,
        guidance_embeds=False,
        vae_scale_factor=vae_scale_factor,
        scheduler=_scheduler(folder, scheduler),
        num_steps=preset.num_steps,
        guidance=preset.guidance or 0.0,
        max_text_tokens=_clip_rows(folder) + preset.max_text_tokens,
        min_size=preset.min_size,
        max_size=preset.max_size,
        default_width=preset.default_width,
        default_height=preset.default_height,
    )


def _default(transformer: _Transformer, vae_scale_factor: int, longest: int) -> Preset:
    """Of a folder without a preset file."""
    preset, side = transformer.preset, min(transformer.sample_size * vae_scale_factor, longest)
    limit = min(preset.max_size, longest)
    return msgspec.structs.replace(
        preset, max_size=limit, default_width=min(side, limit), default_height=min(side, limit)
    )


def _clip_rows(folder: Path) -> int:
    tokenizer = folder / "tokenizer" / checkpoints.TOKENIZER_CONFIG
    if tokenizer.is_file():
        return _decode(tokenizer, _Tokenizer).model_max_length
    return _decode(folder / CLIPS[0] / "config.json", _Clip).max_position_embeddings


def _check_files(folder: Path, encoders: tuple[str, ...], load_format: LoadFormat) -> None:
    parts = ("transformer", "vae", *encoders)
    wanted = ["scheduler/scheduler_config.json", *(f"{part}/config.json" for part in parts)]
    if load_format != "dummy":
        tokenizers = (encoder.replace("text_encoder", "tokenizer") for encoder in encoders)
        wanted += [f"{tokenizer}/{checkpoints.TOKENIZER_CONFIG}" for tokenizer in tokenizers]
    missing = [name for name in wanted if not (folder / name).is_file()]
    if load_format != "dummy":
        missing += [f"{part}/*.safetensors" for part in parts if not any((folder / part).glob("*.safetensors"))]
    if missing:
        raise CheckpointError(f"model: {str(folder)!r} is missing {', '.join(missing)}")


def _scheduler(folder: Path, config: dict[str, Any]) -> SchedulerSpec:
    try:
        return msgspec.convert(config, SchedulerSpec)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"model: {str(folder)!r}: scheduler_config.json: {error}") from None


def _decode(path: Path, kind: type[ConfigT]) -> ConfigT:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"model: {str(path)!r}: {error}") from None
