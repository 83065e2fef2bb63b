"""FLUX.1, for the engine: dev, schnell, Kontext, Fill, and what was trained like them.

A preset may give a text-to-image model `references`: it edits as Kontext does, and begins with a picture if a request
has a strength. Without a preset FLUX.1-dev's own defaults hold, or FLUX.1-schnell's if the model takes no guidance.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from tetrion.engine.config import LoadFormat
from tetrion.engine.errors import RequestError, shown
from tetrion.engine.families.base import Family
from tetrion.engine.families.checkpoint import (
    SCHEDULER,
    SCHEDULER_FILE,
    Preset,
    check_classes,
    check_complete,
    check_shifts,
    check_sizes,
    component_folder,
    model_name,
    pipeline_name,
    read_preset,
    read_scheduler,
)
from tetrion.engine.families.components import (
    ClipConfig,
    Size,
    T5Config,
    VaeConfig,
    check_latents,
    check_width,
    read_clip,
    read_part,
    read_t5,
)
from tetrion.engine.families.files import fault
from tetrion.engine.families.library_shapes import (
    T5_EMBEDDINGS,
    check_autoencoder,
    check_clip,
    check_t5,
    clip_shapes,
    decoder_shapes,
    encoder_shapes,
    t5_shapes,
)
from tetrion.engine.families.pictures import (
    AROUND,
    check_takes_pictures,
    kontext_sizes,
    picture_inputs,
    picture_limits,
)
from tetrion.engine.families.plan import TIME_CHANNELS, WeightsPlan, check_plan, num_planned, num_weights
from tetrion.engine.families.tokenizers import CLIP_TOKENIZER, T5_TOKENIZER, check_tokenizer, max_prompt_tokens
from tetrion.engine.families.weights import read_shapes
from tetrion.engine.model_spec import ModelSpec, Sizes, SlotField
from tetrion.engine.request import ImageRequest
from tetrion.engine.shape import StepShape

WITH_WEIGHTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
CONFIGS = (SCHEDULER_FILE, *(f"{component}/config.json" for component in WITH_WEIGHTS))
TOKENIZERS = {"tokenizer": CLIP_TOKENIZER, "tokenizer_2": T5_TOKENIZER}
TRANSFORMER = "FluxTransformer2DModel"
KONTEXT = "FluxKontextPipeline"
FILL = "FluxFillPipeline"
FILLS = Preset(num_steps=50, guidance=30.0)
CLASSES = {
    "transformer": (TRANSFORMER,),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("T5EncoderModel",),
    "tokenizer": CLIP_TOKENIZER.classes,
    "tokenizer_2": T5_TOKENIZER.classes,
    "scheduler": (SCHEDULER,),
}
SCHNELL = Preset(num_steps=4, guidance=None, max_text_tokens=256)
LATENTS_PER_ROW = 2
"""A row of the image segment covers 2 × 2 latent pixels."""
MLP_RATIO = 4
VECTORS_PER_STREAM = 6
VECTORS_PER_SINGLE = 3
VECTORS_AT_END = 2
_Blocks = Annotated[int, Meta(ge=0, le=1000)]


class FluxConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of `transformer/config.json` (diffusers' names) that decide the computation."""

    in_channels: Size
    num_layers: _Blocks
    num_single_layers: _Blocks
    attention_head_dim: Size
    num_attention_heads: Size
    joint_attention_dim: Size
    pooled_projection_dim: Size
    guidance_embeds: bool = False
    axes_dims_rope: Annotated[tuple[int, ...], Meta(max_length=1000)] = (16, 56, 56)
    patch_size: int = 1
    out_channels: int | None = None

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def token_width(self) -> int:
        """Of latents."""
        return self.in_channels if self.out_channels is None else self.out_channels

    @property
    def extra_channels(self) -> int:
        """What a step reads of each token beside its latents."""
        return self.in_channels - self.token_width

    @property
    def num_vectors(self) -> int:
        """V: shifts, scales and gates of all blocks, each [C]."""
        doubles = 2 * VECTORS_PER_STREAM * self.num_layers
        return doubles + VECTORS_PER_SINGLE * self.num_single_layers + VECTORS_AT_END


def read_config(path: Path) -> FluxConfig:
    """Read `transformer/config.json`. Raises CheckpointError for what the forward pass does not cover; OSError."""
    config = read_part(path.parent, FluxConfig, TRANSFORMER)
    if config.patch_size != 1:
        raise fault(path, f": patch_size must be 1, got {config.patch_size}")
    if config.extra_channels < 0:
        raise fault(path, f": out_channels {config.out_channels} is more than in_channels {config.in_channels}")
    if len(config.axes_dims_rope) != 3 or sum(config.axes_dims_rope) != config.attention_head_dim:
        raise fault(
            path,
            f": axes_dims_rope {shown(list(config.axes_dims_rope))} must be three numbers that add up to"
            f" attention_head_dim {config.attention_head_dim}",
        )
    if any(dim % 2 or dim < 2 for dim in config.axes_dims_rope):
        raise fault(path, f": axes_dims_rope {list(config.axes_dims_rope)} must be even, and at least 2")
    return config


def weights_plan(config: FluxConfig) -> WeightsPlan:
    """Name in a worker's memory -> tensors of a diffusers checkpoint: q, k, v fused, all modulations fused."""
    C, plan = config.hidden_size, WeightsPlan()

    def add_qkv(name: str, projections: Sequence[str], norms: Sequence[str]) -> None:
        plan.linear(f"{name}.qkv", projections, 3 * C, C)
        for norm, source in zip(("q_norm", "k_norm"), norms, strict=True):
            plan.vector(f"{name}.{norm}", f"{source}.weight", config.attention_head_dim)

    plan.linear("image_in", ["x_embedder"], C, config.in_channels)
    plan.linear("text_in", ["context_embedder"], C, config.joint_attention_dim)
    plan.embedder("time_in", "time_text_embed.timestep_embedder", TIME_CHANNELS, C)
    plan.embedder("pooled_in", "time_text_embed.text_embedder", config.pooled_projection_dim, C)
    if config.guidance_embeds:
        plan.embedder("guidance_in", "time_text_embed.guidance_embedder", TIME_CHANNELS, C)
    modulation: list[str] = []
    for i in range(config.num_layers):
        ours, block = f"double.{i}", f"transformer_blocks.{i}"
        attn = f"{block}.attn"
        add_qkv(
            f"{ours}.text",
            [f"{attn}.add_q_proj", f"{attn}.add_k_proj", f"{attn}.add_v_proj"],
            [f"{attn}.norm_added_q", f"{attn}.norm_added_k"],
        )
        add_qkv(
            f"{ours}.image",
            [f"{attn}.to_q", f"{attn}.to_k", f"{attn}.to_v"],
            [f"{attn}.norm_q", f"{attn}.norm_k"],
        )
        plan.linear(f"{ours}.text.out", [f"{attn}.to_add_out"], C, C)
        plan.linear(f"{ours}.image.out", [f"{attn}.to_out.0"], C, C)
        for stream, mlp in (("text", "ff_context"), ("image", "ff")):
            plan.linear(f"{ours}.{stream}.mlp_in", [f"{block}.{mlp}.net.0.proj"], MLP_RATIO * C, C)
            plan.linear(f"{ours}.{stream}.mlp_out", [f"{block}.{mlp}.net.2"], C, MLP_RATIO * C)
        modulation += [f"{block}.norm1_context.linear", f"{block}.norm1.linear"]
    for i in range(config.num_single_layers):
        ours, block = f"single.{i}", f"single_transformer_blocks.{i}"
        attn = f"{block}.attn"
        add_qkv(ours, [f"{attn}.to_q", f"{attn}.to_k", f"{attn}.to_v"], [f"{attn}.norm_q", f"{attn}.norm_k"])
        plan.linear(f"{ours}.mlp_in", [f"{block}.proj_mlp"], MLP_RATIO * C, C)
        plan.linear(f"{ours}.out", [f"{block}.proj_out"], C, (1 + MLP_RATIO) * C)
        modulation.append(f"{block}.norm.linear")
    plan.linear("modulation", [*modulation, "norm_out.linear"], config.num_vectors * C, C)
    plan.linear("final", ["proj_out"], config.token_width, C)
    return plan


class Flux:
    def read(self, folder: Path, load_format: LoadFormat) -> ModelSpec:
        check_classes(folder, CLASSES)
        check_complete(folder, load_format, configs=CONFIGS, tokenizers=TOKENIZERS, with_weights=WITH_WEIGHTS)
        scheduler = read_scheduler(folder)
        transformer = read_config(component_folder(folder, "transformer") / "config.json")
        vae = read_part(component_folder(folder, "vae"), VaeConfig, "AutoencoderKL")
        encoder, encoder_2 = component_folder(folder, "text_encoder"), component_folder(folder, "text_encoder_2")
        clip, t5 = read_clip(encoder), read_t5(encoder_2)
        if load_format != "dummy":
            _check_files(folder, transformer, vae, clip, t5)
        pipeline = pipeline_name(folder)
        is_kontext, is_fill = pipeline == KONTEXT, pipeline == FILL
        check_latents(component_folder(folder, "vae"), vae, transformer.token_width, LATENTS_PER_ROW**2)
        _check_extra(folder, transformer, vae, is_fill)
        pooled, text = transformer.pooled_projection_dim, transformer.joint_attention_dim
        check_width(encoder, "hidden_size", clip.hidden_size, "pooled_projection_dim", pooled)
        check_width(encoder_2, "d_model", t5.d_model, "joint_attention_dim", text)
        preset = read_preset(folder, FILLS if is_fill else Preset() if transformer.guidance_embeds else SCHNELL)
        sizes = Sizes(
            min=preset.min_size,
            max=preset.max_size,
            multiple=LATENTS_PER_ROW * vae.scale_factor,
            default=(preset.default_width, preset.default_height),
        )
        check_shifts(folder, scheduler, check_sizes(folder, sizes))
        row = transformer.hidden_size
        pictures, inputs = picture_limits(folder, load_format), picture_inputs(folder, load_format)
        has_references = is_kontext or preset.references > 0
        if has_references:
            pictures = {"max_pictures": 1, "reference_sizes": kontext_sizes(folder, load_format, sizes)}
        if is_kontext:
            inputs = frozenset({"pictures"})
        if is_fill:
            check_takes_pictures(folder, load_format)
            pictures, inputs = pictures | {"strength": 1.0}, inputs | {"mask"}
        guided = frozenset() if is_fill else frozenset({"negative_prompt", "true_cfg_scale"})
        vae_shapes = decoder_shapes(vae) | (encoder_shapes(vae) if "pictures" in inputs else {})
        return ModelSpec(
            name=model_name(folder, preset),
            path=str(folder.resolve()),
            family="flux",
            num_heads=transformer.num_attention_heads,
            head_dim=transformer.attention_head_dim,
            segments=("text", "image", "reference") if has_references else ("text", "image"),
            fields=(
                SlotField(name="text", rows="text", width=row, per_branch=True),
                SlotField(name="pooled", rows="one", width=transformer.pooled_projection_dim, per_branch=True),
                *([SlotField(name="reference", rows="reference", width=row)] if has_references else []),
                *([SlotField(name=AROUND, rows="image", width=transformer.extra_channels)] if is_fill else []),
                SlotField(name="latents", rows="image", width=transformer.token_width, fp32=True, changes=True),
            ),
            max_branches=1 if is_fill else 2,
            scheduler=scheduler,
            num_steps=preset.num_steps,
            guidance=preset.guidance or 0.0,
            max_text_tokens=preset.max_text_tokens,
            sizes=sizes,
            inputs=guided | inputs,
            **pictures,
            weights=(
                ("transformer", num_planned(weights_plan(transformer))),
                ("vae", num_weights(vae_shapes.values())),
                ("text_encoder", num_weights(clip_shapes(clip, is_projected=False).values())),
                ("text_encoder_2", num_weights(t5_shapes(t5, T5_EMBEDDINGS[0]).values())),
            ),
        )

    def check(self, spec: ModelSpec, request: ImageRequest) -> None:
        """Guidance by a second branch takes both a prompt and a scale, as in diffusers' FluxPipeline. A model that
        fills takes a picture and where."""
        if "mask" in spec.inputs and not request.pictures:
            raise RequestError("pictures", f"model {spec.name!r} fills a picture, and takes one")
        if "mask" in spec.inputs and request.mask is None:
            raise RequestError(
                "mask", f"model {spec.name!r} takes one, or a picture that is transparent where it fills"
            )
        if request.negative_prompt is not None and not _has_scale(request):
            raise RequestError("negative_prompt", "takes a true_cfg_scale above 1 to go with it")
        if _has_scale(request) and request.negative_prompt is None:
            raise RequestError("true_cfg_scale", "above 1 takes a negative_prompt to go with it")

    def shape(self, spec: ModelSpec, request: ImageRequest) -> StepShape:
        assert request.width is not None and request.height is not None
        return spec.shape(request.width, request.height, 2 if _has_scale(request) else 1)


def _check_extra(folder: Path, transformer: FluxConfig, vae: VaeConfig, is_fill: bool) -> None:
    """Raises CheckpointError unless a step reads beside latents what it is given: of a model that fills, latents of
    what is around, and each of a token's pixels."""
    path = component_folder(folder, "transformer") / "config.json"
    found, out = transformer.extra_channels, transformer.token_width
    expected = out + (LATENTS_PER_ROW * vae.scale_factor) ** 2 if is_fill else 0
    if found and not is_fill:
        raise fault(path, f": out_channels {out} must equal in_channels {transformer.in_channels}")
    if found != expected:
        raise fault(path, f": in_channels {transformer.in_channels} must be {out + expected} with out_channels {out}")


def _check_files(folder: Path, transformer: FluxConfig, vae: VaeConfig, clip: ClipConfig, t5: T5Config) -> None:
    """Weights and tokenizers by what their configs mean. Raises CheckpointError; OSError."""
    folders = {name: component_folder(folder, name) for name in (*WITH_WEIGHTS, *TOKENIZERS)}
    check_tokenizer(folders["tokenizer"], CLIP_TOKENIZER, clip.vocab_size)
    max_prompt_tokens(folders["tokenizer"], clip.max_position_embeddings)
    check_tokenizer(folders["tokenizer_2"], T5_TOKENIZER, t5.vocab_size)
    shapes = {name: read_shapes(folders[name]) for name in WITH_WEIGHTS}
    check_plan(weights_plan(transformer), shapes["transformer"], folders["transformer"])
    check_autoencoder(folders["vae"], vae, shapes["vae"])
    check_clip(folders["text_encoder"], clip, shapes["text_encoder"])
    check_t5(folders["text_encoder_2"], t5, shapes["text_encoder_2"])


def _has_scale(request: ImageRequest) -> bool:
    return request.true_cfg_scale is not None and request.true_cfg_scale > 1


FAMILY: Family = Flux()
