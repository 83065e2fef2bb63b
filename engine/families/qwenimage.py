"""Qwen-Image, for the engine.

A text has as many rows as its prompt has tokens. There is a second branch only with a negative prompt; what it leads to
is as long, row by row, as the prompt's own velocity.
"""

import functools
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from tetrion.engine.config import LoadFormat
from tetrion.engine.errors import RequestError
from tetrion.engine.families.base import Family
from tetrion.engine.families.checkpoint import (
    PRESET_FILE,
    SCHEDULER,
    SCHEDULER_FILE,
    Preset,
    check_classes,
    check_complete,
    check_shifts,
    check_sizes,
    component_folder,
    model_name,
    read_preset,
    read_scheduler,
)
from tetrion.engine.families.components import (
    QWEN25_VLS,
    Count,
    Qwen25VlConfig,
    Size,
    check_axes,
    check_width,
    read_part,
    read_qwen25_vl,
)
from tetrion.engine.families.files import fault
from tetrion.engine.families.library_shapes import check_language, language_shapes
from tetrion.engine.families.pictures import STRENGTH
from tetrion.engine.families.plan import TIME_CHANNELS, WeightsPlan, check_plan, num_planned, num_weights
from tetrion.engine.families.prompts import DESCRIBED, NUM_BEFORE_DESCRIBED, PromptReader, check_template
from tetrion.engine.families.qwen_image_vae import (
    VAE_CLASS,
    QwenImageVaeConfig,
    check_autoencoder,
    check_latents,
    decoder_shapes,
    encoder_shapes,
    frame_shapes,
    has_encoder,
)
from tetrion.engine.families.tokenizers import QWEN_TOKENIZER, check_tokenizer
from tetrion.engine.families.weights import read_shapes
from tetrion.engine.model_spec import ModelSpec, Sizes, SlotField
from tetrion.engine.request import ImageRequest
from tetrion.engine.shape import StepShape

WITH_WEIGHTS = ("transformer", "vae", "text_encoder")
TRANSFORMER = "QwenImageTransformer2DModel"
CLASSES = {
    "transformer": (TRANSFORMER,),
    "vae": (VAE_CLASS,),
    "text_encoder": QWEN25_VLS[:1],
    "tokenizer": QWEN_TOKENIZER.classes,
    "scheduler": (SCHEDULER,),
}
PRESET = Preset(num_steps=50, guidance=4.0, max_text_tokens=1024)
MAX_TEXT_TOKENS = 1024
"""Of a prompt, as in diffusers."""
CHAT, NUM_DROPPED = DESCRIBED, NUM_BEFORE_DESCRIBED
PATCH = 2
"""A row of the image segment covers 2 × 2 latent pixels."""
MLP_RATIO = 4
VECTORS = 6
"""Of a stream in a block: shift, scale and gate of attention, then of the MLP."""
VECTORS_AT_END = 2
"""Scale, then shift."""


class QwenImageConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of `transformer/config.json` (diffusers' names) that decide the computation. `zero_cond_t`: references
    are seen as of the last step's time, 0, in all steps."""

    patch_size: Literal[2] = 2
    in_channels: Size = 64
    out_channels: Size | None = 16
    num_layers: Count = 60
    attention_head_dim: Size = 128
    num_attention_heads: Size = 24
    joint_attention_dim: Size = 3584
    guidance_embeds: Literal[False] = False
    axes_dims_rope: Annotated[tuple[Size, ...], Meta(min_length=3, max_length=3)] = (16, 56, 56)
    zero_cond_t: bool = False
    use_additional_t_cond: Literal[False] = False
    use_layer3d_rope: Literal[False] = False

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def streams_with_vectors(self) -> int:
        """Text, image, and references if they are seen as of another time."""
        return 3 if self.zero_cond_t else 2

    @property
    def num_vectors(self) -> int:
        """V: shifts, scales and gates of all blocks, each [C]."""
        return self.streams_with_vectors * VECTORS * self.num_layers + VECTORS_AT_END


def read_config(path: Path) -> QwenImageConfig:
    """Read `transformer/config.json`. Raises CheckpointError for what the forward pass does not cover; OSError."""
    config = read_part(path.parent, QwenImageConfig, TRANSFORMER)
    if PATCH**2 * (config.out_channels or config.in_channels) != config.in_channels:
        raise fault(path, f": in_channels {config.in_channels} must be four times out_channels {config.out_channels}")
    check_axes(path, config.axes_dims_rope, config.attention_head_dim)
    return config


def weights_plan(config: QwenImageConfig) -> WeightsPlan:
    """Name in a worker's memory -> tensors of a diffusers checkpoint: q, k, v fused, a block's modulations fused."""
    C, plan = config.hidden_size, WeightsPlan()
    plan.linear("image_in", ["img_in"], C, config.in_channels)
    plan.vector("text_norm", "txt_norm.weight", config.joint_attention_dim)
    plan.linear("text_in", ["txt_in"], C, config.joint_attention_dim)
    plan.embedder("time_in", "time_text_embed.timestep_embedder", TIME_CHANNELS, C)
    for i in range(config.num_layers):
        block = f"transformer_blocks.{i}"
        attn = f"{block}.attn"
        for stream, projections, norms, out, mlp in (
            ("text", [f"{attn}.add_{x}_proj" for x in "qkv"], f"{attn}.norm_added_", "to_add_out", "txt_mlp"),
            ("image", [f"{attn}.to_{x}" for x in "qkv"], f"{attn}.norm_", "to_out.0", "img_mlp"),
        ):
            ours = f"block.{i}.{stream}"
            plan.linear(f"{ours}.qkv", projections, 3 * C, C)
            for x in "qk":
                plan.vector(f"{ours}.{x}_norm", f"{norms}{x}.weight", config.attention_head_dim)
            plan.linear(f"{ours}.out", [f"{attn}.{out}"], C, C)
            plan.linear(f"{ours}.mlp_in", [f"{block}.{mlp}.net.0.proj"], MLP_RATIO * C, C)
            plan.linear(f"{ours}.mlp_out", [f"{block}.{mlp}.net.2"], C, MLP_RATIO * C)
        plan.linear(f"block.{i}.modulation", [f"{block}.txt_mod.1", f"{block}.img_mod.1"], 2 * VECTORS * C, C)
    plan.linear("modulation_at_end", ["norm_out.linear"], VECTORS_AT_END * C, C)
    plan.linear("final", ["proj_out"], config.in_channels, C)
    return plan


class QwenImage:
    def read(self, folder: Path, load_format: LoadFormat) -> ModelSpec:
        check_classes(folder, CLASSES)
        check_complete(
            folder,
            load_format,
            configs=(SCHEDULER_FILE, *(f"{component}/config.json" for component in WITH_WEIGHTS)),
            tokenizers={"tokenizer": QWEN_TOKENIZER},
            with_weights=WITH_WEIGHTS,
        )
        scheduler, preset = read_scheduler(folder), read_preset(folder, PRESET)
        transformer = read_config(component_folder(folder, "transformer") / "config.json")
        vae = read_part(component_folder(folder, "vae"), QwenImageVaeConfig, VAE_CLASS)
        encoder, language = _read_language(folder, preset)
        if load_format != "dummy":
            _check_files(folder, transformer, vae, language)
        check_latents(component_folder(folder, "vae"), vae, transformer.in_channels)
        width = language.hidden_size
        check_width(encoder, "hidden_size", width, "joint_attention_dim", transformer.joint_attention_dim)
        sizes = Sizes(
            min=preset.min_size,
            max=preset.max_size,
            multiple=PATCH * vae.scale_factor,
            default=(preset.default_width, preset.default_height),
        )
        check_shifts(folder, scheduler, check_sizes(folder, sizes))
        if preset.max_text_tokens > MAX_TEXT_TOKENS:
            raise fault(
                folder / PRESET_FILE,
                f": max_text_tokens {preset.max_text_tokens} must be at most {MAX_TEXT_TOKENS}",
            )
        begins_with_pictures = _has_encoder(folder, load_format)
        vae_shapes = decoder_shapes(vae) | (encoder_shapes(vae) if begins_with_pictures else {})
        return ModelSpec(
            name=model_name(folder, preset),
            path=str(folder.resolve()),
            family="qwenimage",
            num_heads=transformer.num_attention_heads,
            head_dim=transformer.attention_head_dim,
            segments=("text", "image"),
            fields=(
                SlotField(name="text", rows="text", width=transformer.hidden_size, per_branch=True),
                SlotField(name="latents", rows="image", width=transformer.in_channels, fp32=True, changes=True),
            ),
            max_branches=2,
            scheduler=scheduler,
            num_steps=preset.num_steps,
            guidance=preset.guidance or 0.0,
            max_text_tokens=preset.max_text_tokens,
            sizes=sizes,
            inputs=frozenset({"negative_prompt", *(["pictures", "strength"] if begins_with_pictures else [])}),
            max_pictures=1 if begins_with_pictures else 0,
            strength=STRENGTH if begins_with_pictures else None,
            weights=(
                ("transformer", num_planned(weights_plan(transformer))),
                ("vae", num_weights(frame_shapes(vae_shapes).values())),
                ("text_encoder", num_weights(language_shapes(language, language.num_hidden_layers, True).values())),
            ),
        )

    def check(self, spec: ModelSpec, request: ImageRequest) -> None:
        """A negative prompt that nothing would look at is refused."""
        if request.negative_prompt is not None and not _is_guided(request):
            raise RequestError("negative_prompt", "takes a guidance above 1 to go with it")

    def shape(self, spec: ModelSpec, request: ImageRequest) -> StepShape:
        """Guidance without a negative prompt is no reason for a second branch, as in diffusers' QwenImagePipeline."""
        assert request.width is not None and request.height is not None
        reader = prompt_reader(Path(spec.path))
        prompts = [request.prompt, *([request.negative_prompt or ""] if _is_guided(request) else [])]
        text = tuple(reader.num_rows(prompt) for prompt in prompts)
        return msgspec.structs.replace(spec.shape(request.width, request.height), text=text)


@functools.lru_cache(maxsize=8)
def prompt_reader(folder: Path) -> PromptReader:
    """Of the checkpoint in `folder`. Raises CheckpointError; OSError."""
    return _prompt_reader(folder)


def _prompt_reader(folder: Path) -> PromptReader:
    """As its files are now."""
    preset = read_preset(folder, PRESET)
    _, language = _read_language(folder, preset)
    tokenizer, num_tokens = component_folder(folder, "tokenizer"), NUM_DROPPED + preset.max_text_tokens
    reader = PromptReader(tokenizer, CHAT, language.vocab_size, num_tokens, NUM_DROPPED)
    reader.pads_left = False  # rows of padding are not looked at, and a prompt's own are to come first
    return reader


def _is_guided(request: ImageRequest) -> bool:
    assert request.guidance is not None
    return request.guidance > 1 and request.negative_prompt is not None


def _has_encoder(folder: Path, load_format: LoadFormat) -> bool:
    """Whether the VAE has the half that makes latents of pictures. Raises CheckpointError; OSError."""
    return load_format == "dummy" or has_encoder(read_shapes(component_folder(folder, "vae")))


def _read_language(folder: Path, preset: Preset) -> tuple[Path, Qwen25VlConfig]:
    encoder = component_folder(folder, "text_encoder")
    return encoder, read_qwen25_vl(encoder, NUM_DROPPED + preset.max_text_tokens)


def _check_files(folder: Path, transformer: QwenImageConfig, vae: QwenImageVaeConfig, language: Qwen25VlConfig) -> None:
    """Weights and tokenizer by what their configs mean. Raises CheckpointError; OSError."""
    folders = {name: component_folder(folder, name) for name in WITH_WEIGHTS}
    tokenizer = component_folder(folder, "tokenizer")
    check_tokenizer(tokenizer, QWEN_TOKENIZER, language.vocab_size)
    check_template(tokenizer, CHAT)
    if (num_tokens := len(_prompt_reader(folder).read("").ids)) <= NUM_DROPPED:
        raise fault(tokenizer, f" makes {num_tokens} tokens of an empty prompt, of which {NUM_DROPPED} are dropped")
    check_plan(weights_plan(transformer), read_shapes(folders["transformer"]), folders["transformer"])
    check_autoencoder(folders["vae"], vae, read_shapes(folders["vae"]))
    encoder = folders["text_encoder"]
    check_language(encoder, language, language.num_hidden_layers, read_shapes(encoder), True)


FAMILY: Family = QwenImage()
