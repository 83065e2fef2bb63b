"""FLUX.2, for the engine: dev, and klein 4B and 9B, base and distilled, which `is_distilled` in model_index.json tells.

klein's base models are guided by a second branch, whose prompt is empty unless there is a negative one; distilled ones
take no guidance, dev takes it as an input. All rows of a text are attended to, those of padding, too. Pictures are
references, each in its own shape.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from tetrion.engine.config import LoadFormat
from tetrion.engine.errors import RequestError
from tetrion.engine.families.base import Family
from tetrion.engine.families.checkpoint import (
    INDEX_FILE,
    MAX_SHIFT,
    PRESET_FILE,
    SCHEDULER,
    SCHEDULER_FILE,
    Preset,
    check_classes,
    check_complete,
    check_sizes,
    component_folder,
    model_name,
    pipeline_name,
    read_preset,
    read_scheduler,
)
from tetrion.engine.families.components import (
    MISTRAL3S,
    QWEN3S,
    Flux2VaeConfig,
    LanguageConfig,
    Size,
    check_axes,
    check_latents,
    check_width,
    convert,
    read_mistral3,
    read_part,
    read_qwen3,
)
from tetrion.engine.families.files import fault, read_object
from tetrion.engine.families.library_shapes import (
    check_autoencoder,
    check_language,
    decoder_shapes,
    encoder_shapes,
    language_shapes,
)
from tetrion.engine.families.pictures import takes_pictures
from tetrion.engine.families.plan import TIME_CHANNELS, WeightsPlan, check_plan, num_planned, num_weights
from tetrion.engine.families.prompts import ChatForm, PromptReader, check_template
from tetrion.engine.families.tokenizers import MISTRAL_TOKENIZER, QWEN_TOKENIZER, TokenizerKind, check_tokenizer
from tetrion.engine.families.weights import read_shapes
from tetrion.engine.model_spec import ModelSpec, ReferenceArea, Sizes, SlotField
from tetrion.engine.request import ImageRequest
from tetrion.engine.shape import StepShape

WITH_WEIGHTS = ("transformer", "vae", "text_encoder")
TRANSFORMER, VAE = "Flux2Transformer2DModel", "AutoencoderKLFlux2"
CLASSES: dict[str, tuple[str, ...]] = {"transformer": (TRANSFORMER,), "vae": (VAE,), "scheduler": (SCHEDULER,)}
BASE = Preset(num_steps=50, guidance=4.0, max_text_tokens=512)
DISTILLED = Preset(num_steps=4, guidance=None, max_text_tokens=512)


class TextKind(NamedTuple):
    """A text encoder with its tokenizer. `layers`: whose outputs are put side by side."""

    encoders: tuple[str, ...]
    tokenizers: tuple[str, ...]
    tokenizer: TokenizerKind
    form: ChatForm
    layers: tuple[int, ...]
    read: Callable[[Path, int, int], LanguageConfig]

    @property
    def num_layers(self) -> int:
        """How many are run."""
        return max(self.layers)

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        return {"text_encoder": self.encoders, "tokenizer": self.tokenizers}


KLEIN = TextKind(
    encoders=QWEN3S,
    tokenizers=QWEN_TOKENIZER.classes,
    tokenizer=QWEN_TOKENIZER,
    form=ChatForm("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    layers=(9, 18, 27),
    read=read_qwen3,
)
DEV = TextKind(
    encoders=MISTRAL3S,
    tokenizers=("PixtralProcessor",),
    tokenizer=MISTRAL_TOKENIZER,
    form=ChatForm(
        "<s>[SYSTEM_PROMPT]You are an AI that reasons about image descriptions. You give structured responses focusing"
        " on object relationships, object\nattribution and actions without speculation.[/SYSTEM_PROMPT][INST]",
        "[/INST]",
        left_out="[IMG]",
        has_ends=True,
    ),
    layers=(10, 20, 30),
    read=read_mistral3,
)
TEXT_KINDS = {"Flux2KleinPipeline": KLEIN, "Flux2Pipeline": DEV}
LATENTS_PER_ROW = 2
"""A row of the image segment covers 2 × 2 latent pixels."""
MAX_PICTURES = 4
MIN_REFERENCE_SIDE, MAX_REFERENCE_RATIO = 64, 8
"""Of pictures that are brought: diffusers' bounds."""
VECTORS_PER_STREAM = 6
VECTORS_PER_SINGLE = 3
VECTORS_AT_END = 2
NUM_VECTORS = 2 * VECTORS_PER_STREAM + VECTORS_PER_SINGLE + VECTORS_AT_END
"""All blocks of a kind have the same."""
EPSILON = 1e-6
"""Of all norms."""
_Blocks = Annotated[int, Meta(ge=0, le=1000)]


class Flux2Config(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of `transformer/config.json` (diffusers' names) that decide the computation."""

    in_channels: Size = 128
    out_channels: int | None = None
    num_layers: _Blocks = 8
    num_single_layers: _Blocks = 48
    attention_head_dim: Size = 128
    num_attention_heads: Size = 48
    joint_attention_dim: Size = 15360
    timestep_guidance_channels: Literal[256] = 256
    mlp_ratio: Annotated[float, Meta(gt=0, le=100)] = 3.0
    axes_dims_rope: Annotated[tuple[Size, ...], Meta(min_length=4, max_length=4)] = (32, 32, 32, 32)
    rope_theta: Annotated[float, Meta(gt=0, le=1e9)] = 2000
    eps: float = EPSILON
    guidance_embeds: bool = True
    patch_size: Literal[1] = 1

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_width(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)


class _Index(msgspec.Struct, frozen=True):
    """Of model_index.json."""

    is_distilled: bool = False


def read_config(path: Path) -> Flux2Config:
    """Read `transformer/config.json`. Raises CheckpointError for what the forward pass does not cover; OSError."""
    config = read_part(path.parent, Flux2Config, TRANSFORMER)
    if config.out_channels not in (None, config.in_channels):
        raise fault(path, f": out_channels {config.out_channels} must equal in_channels {config.in_channels}")
    if config.eps != EPSILON:
        raise fault(path, f": eps must be {EPSILON:g}, got {config.eps:g}")
    check_axes(path, config.axes_dims_rope, config.attention_head_dim)
    return config


def weights_plan(config: Flux2Config) -> WeightsPlan:
    """Name in a worker's memory -> tensors of a diffusers checkpoint: q, k, v fused, all modulations fused. A single
    block's layer for q, k, v and the MLP is two. No layer has a bias."""
    C, F, plan = config.hidden_size, config.mlp_width, WeightsPlan()
    linear = functools.partial(plan.linear, has_bias=False)
    linear("image_in", ["x_embedder"], C, config.in_channels)
    linear("text_in", ["context_embedder"], C, config.joint_attention_dim)
    plan.embedder("time_in", "time_guidance_embed.timestep_embedder", TIME_CHANNELS, C, has_bias=False)
    if config.guidance_embeds:
        plan.embedder("guidance_in", "time_guidance_embed.guidance_embedder", TIME_CHANNELS, C, has_bias=False)
    kinds = ("double_stream_modulation_txt", "double_stream_modulation_img", "single_stream_modulation", "norm_out")
    linear("modulation", [f"{kind}.linear" for kind in kinds], NUM_VECTORS * C, C)
    for i in range(config.num_layers):
        block = f"transformer_blocks.{i}"
        attn = f"{block}.attn"
        for stream, projections, norms, out, mlp in (
            ("text", [f"{attn}.add_{x}_proj" for x in "qkv"], f"{attn}.norm_added_", "to_add_out", "ff_context"),
            ("image", [f"{attn}.to_{x}" for x in "qkv"], f"{attn}.norm_", "to_out.0", "ff"),
        ):
            ours = f"double.{i}.{stream}"
            linear(f"{ours}.qkv", projections, 3 * C, C)
            for x in "qk":
                plan.vector(f"{ours}.{x}_norm", f"{norms}{x}.weight", config.attention_head_dim)
            linear(f"{ours}.out", [f"{attn}.{out}"], C, C)
            linear(f"{ours}.mlp_in", [f"{block}.{mlp}.linear_in"], 2 * F, C)
            linear(f"{ours}.mlp_out", [f"{block}.{mlp}.linear_out"], C, F)
    for i in range(config.num_single_layers):
        ours, attn = f"single.{i}", f"single_transformer_blocks.{i}.attn"
        plan.slices({f"{ours}.qkv": 3 * C, f"{ours}.mlp_in": 2 * F}, f"{attn}.to_qkv_mlp_proj", C)
        for x in "qk":
            plan.vector(f"{ours}.{x}_norm", f"{attn}.norm_{x}.weight", config.attention_head_dim)
        linear(f"{ours}.out", [f"{attn}.to_out"], C, C + F)
    linear("final", ["proj_out"], config.in_channels, C)
    return plan


class Flux2:
    def read(self, folder: Path, load_format: LoadFormat) -> ModelSpec:
        text = text_kind(folder)
        check_classes(folder, CLASSES | text.classes)
        check_complete(
            folder,
            load_format,
            configs=(SCHEDULER_FILE, *(f"{component}/config.json" for component in WITH_WEIGHTS)),
            tokenizers={"tokenizer": text.tokenizer},
            with_weights=WITH_WEIGHTS,
        )
        is_distilled = convert(folder / INDEX_FILE, read_object(folder / INDEX_FILE), _Index).is_distilled
        scheduler, preset = read_scheduler(folder), read_preset(folder, DISTILLED if is_distilled else BASE)
        transformer = read_config(component_folder(folder, "transformer") / "config.json")
        vae = read_part(component_folder(folder, "vae"), Flux2VaeConfig, VAE)
        encoder = component_folder(folder, "text_encoder")
        language = text.read(encoder, text.num_layers, preset.max_text_tokens)
        if load_format != "dummy":
            _check_files(folder, transformer, vae, text, language)
        check_latents(component_folder(folder, "vae"), vae, transformer.in_channels, LATENTS_PER_ROW**2)
        width = len(text.layers) * language.hidden_size
        check_width(encoder, "3 · hidden_size", width, "joint_attention_dim", transformer.joint_attention_dim)
        sizes = Sizes(
            min=preset.min_size,
            max=preset.max_size,
            multiple=LATENTS_PER_ROW * vae.scale_factor,
            default=(preset.default_width, preset.default_height),
        )
        _check_shift(folder, check_sizes(folder, sizes))
        area = _reference_area(sizes) if takes_pictures(folder, load_format, vae) else None
        has_references = area is not None
        vae_shapes = decoder_shapes(vae) | (encoder_shapes(vae) if has_references else {})
        max_branches = 1 if is_distilled or text is DEV else 2
        return ModelSpec(
            name=model_name(folder, preset),
            path=str(folder.resolve()),
            family="flux2",
            num_heads=transformer.num_attention_heads,
            head_dim=transformer.attention_head_dim,
            segments=("text", "image", "reference") if has_references else ("text", "image"),
            fields=(
                SlotField(name="text", rows="text", width=transformer.hidden_size, per_branch=True),
                *([SlotField(name="reference", rows="reference", width=transformer.in_channels)] if area else []),
                SlotField(name="latents", rows="image", width=transformer.in_channels, fp32=True, changes=True),
            ),
            max_branches=max_branches,
            scheduler=scheduler,
            num_steps=preset.num_steps,
            guidance=preset.guidance or 0.0,
            max_text_tokens=preset.max_text_tokens,
            sizes=sizes,
            inputs=frozenset({"negative_prompt"} if max_branches > 1 else ())
            | frozenset({"pictures"} if has_references else ()),
            max_pictures=MAX_PICTURES if has_references else 0,
            reference_area=area,
            weights=(
                ("transformer", num_planned(weights_plan(transformer))),
                ("vae", num_weights(vae_shapes.values())),
                ("text_encoder", num_weights(language_shapes(language, text.num_layers).values())),
            ),
        )

    def check(self, spec: ModelSpec, request: ImageRequest) -> None:
        """A negative prompt that nothing would look at is refused."""
        if request.negative_prompt is not None and not _is_guided(spec, request):
            raise RequestError("negative_prompt", "takes a guidance above 1 to go with it")

    def shape(self, spec: ModelSpec, request: ImageRequest) -> StepShape:
        """Guidance up to 1 is no reason for a second branch, nor is any of a distilled model, as in diffusers'
        Flux2KleinPipeline."""
        assert request.width is not None and request.height is not None
        return spec.shape(request.width, request.height, 2 if _is_guided(spec, request) else 1)


def dynamic_shift(num_rows: int, num_steps: int) -> float:
    """The shift of noise levels, as fitted by FLUX.2's authors: between that of 10 and of 200 steps, both linear in the
    rows of the picture; of large pictures that of 200."""
    of_200 = 0.00016927 * num_rows + 0.45666666
    if num_rows > 4300:
        return of_200
    of_10 = 8.73809524e-05 * num_rows + 1.89833333
    slope = (of_200 - of_10) / 190.0
    return slope * num_steps + (of_200 - 200.0 * slope)


def text_kind(folder: Path) -> TextKind:
    """Of the checkpoint in `folder`. Raises CheckpointError."""
    return TEXT_KINDS[str(pipeline_name(folder))]


@functools.lru_cache(maxsize=8)
def prompt_reader(folder: Path) -> PromptReader:
    """Of the checkpoint in `folder`. Raises CheckpointError; OSError."""
    return _prompt_reader(folder)


def _prompt_reader(folder: Path) -> PromptReader:
    """As its files are now."""
    preset = read_preset(folder, BASE)
    text, encoder = text_kind(folder), component_folder(folder, "text_encoder")
    language = text.read(encoder, text.num_layers, preset.max_text_tokens)
    return PromptReader(component_folder(folder, "tokenizer"), text.form, language.vocab_size, preset.max_text_tokens)


def _is_guided(spec: ModelSpec, request: ImageRequest) -> bool:
    assert request.guidance is not None
    return request.guidance > 1 and spec.max_branches > 1


def _reference_area(sizes: Sizes) -> ReferenceArea:
    """As large as the picture that is drawn by default, which is diffusers' 1024²."""
    return ReferenceArea(
        pixels=max(math.prod(sizes.default), 2 * MAX_REFERENCE_RATIO * sizes.multiple**2),
        multiple=sizes.multiple,
        is_most=True,
        min_side=MIN_REFERENCE_SIDE,
        max_ratio=MAX_REFERENCE_RATIO,
    )


def _check_files(
    folder: Path, transformer: Flux2Config, vae: Flux2VaeConfig, text: TextKind, language: LanguageConfig
) -> None:
    """Weights and tokenizer by what their configs mean. Raises CheckpointError; OSError."""
    folders = {name: component_folder(folder, name) for name in WITH_WEIGHTS}
    check_tokenizer(component_folder(folder, "tokenizer"), text.tokenizer, language.vocab_size)
    check_template(component_folder(folder, "tokenizer"), text.form)
    _prompt_reader(folder)
    check_plan(weights_plan(transformer), read_shapes(folders["transformer"]), folders["transformer"])
    check_autoencoder(folders["vae"], vae, read_shapes(folders["vae"]))
    encoder = folders["text_encoder"]
    check_language(encoder, language, text.num_layers, read_shapes(encoder))


def _check_shift(folder: Path, sizes: Sizes) -> None:
    """Raises CheckpointError if the noise levels of the largest pictures cannot be computed."""
    shift = dynamic_shift(sizes.num_rows(sizes.max, sizes.max), 1)
    if shift > MAX_SHIFT:
        raise fault(
            folder / PRESET_FILE, f": max_size {sizes.max} makes a shift of {shift:g}, at most {MAX_SHIFT:g} can be"
        )


FAMILY: Family = Flux2()
