"""Qwen-Image-2.1 and its Turbo, for the engine.

Steps work on the image alone: a text's keys and values do not depend on them, and each member of a group computes those
once a request, from the text's final rows. A text has as many rows as its prompt has tokens. There is a second branch
only with a negative prompt and a guidance above 1.

The networks of both are the same. Turbo is what lists its noise levels (`sample_sigmas` of model_index.json), or has a
preset; a request for another number of steps gets evenly spaced ones.
"""

import functools
import itertools
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from tetrion.engine.config import LoadFormat
from tetrion.engine.errors import RequestError, shown
from tetrion.engine.families.base import Family
from tetrion.engine.families.checkpoint import (
    INDEX_FILE,
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
    QWEN3_VLS,
    Count,
    LanguageConfig,
    Size,
    check_axes,
    check_width,
    convert,
    read_part,
    read_qwen3_vl,
)
from tetrion.engine.families.files import fault, read_object
from tetrion.engine.families.library_shapes import check_language, language_shapes
from tetrion.engine.families.plan import TIME_CHANNELS, WeightsPlan, check_plan, num_planned, num_weights
from tetrion.engine.families.prompts import ChatForm, PromptReader, check_template, load_tokenizer
from tetrion.engine.families.qwen_image21_vae import (
    SCALE_FACTOR,
    VAE_CLASS,
    QwenImage21VaeConfig,
    check_autoencoder,
    decoder_shapes,
)
from tetrion.engine.families.tokenizers import QWEN_TOKENIZER, check_tokenizer, has_vocabulary
from tetrion.engine.families.weights import read_shapes
from tetrion.engine.model_spec import ModelSpec, Sizes, SlotField
from tetrion.engine.request import ImageRequest
from tetrion.engine.shape import StepShape

WITH_WEIGHTS = ("transformer", "vae", "text_encoder")
TRANSFORMER = "QwenImage21Transformer2DModel"
CLASSES = {
    "transformer": (TRANSFORMER,),
    "vae": (VAE_CLASS,),
    "text_encoder": QWEN3_VLS[:1],
    "processor": ("Qwen3VLProcessor",),
    "scheduler": (SCHEDULER,),
}
PRESET = Preset(num_steps=40, guidance=1.0, max_text_tokens=1024)
SYSTEM = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
"""Its tokens' states are dropped."""
CHAT = ChatForm(f"{SYSTEM}<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
EMPTY = " "
"""What is read in place of an empty prompt."""
DROPPED_WITHOUT_TOKENIZER = 14
ROWS_EACH = 4
"""Image tokens of 16 × 16 pixels in the 32 × 32 that sides are multiples of."""
EPSILON = 1e-6
THETA = 10_000.0
NUM_VECTORS = 6
"""The same for all blocks: zeros, then scale and gate of attention and of the MLP, then the scale at the end."""
_Level = Annotated[float, Meta(gt=0, le=1)]


class QwenImage21Config(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of `transformer/config.json` (diffusers' names) that decide the computation."""

    patch_size: Annotated[int, Meta(ge=1, le=1)] = 1
    in_channels: Size = 64
    out_channels: Size | None = 64
    num_layers: Count = 32
    attention_head_dim: Size = 128
    num_attention_heads: Size = 32
    context_in_dim: Size = 4096
    mlp_ratio: Count = 3
    axes_dims_rope: Annotated[tuple[Size, ...], Meta(min_length=3, max_length=3)] = (16, 56, 56)
    eps: float = EPSILON
    causal_condition: bool = True

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_width(self) -> int:
        return self.mlp_ratio * self.hidden_size


class _Index(msgspec.Struct, frozen=True, kw_only=True):
    """Of model_index.json. `sample_sigmas`: noise levels before they are shifted, the largest first."""

    sample_sigmas: Annotated[tuple[_Level, ...], Meta(min_length=1, max_length=1000)] | None = None

    def __post_init__(self) -> None:
        levels = self.sample_sigmas or ()
        if any(later >= level for level, later in itertools.pairwise(levels)):
            raise ValueError(f"sample_sigmas {shown(list(levels))} must fall")


def read_config(path: Path) -> QwenImage21Config:
    """Read `transformer/config.json`. Raises CheckpointError for what the forward pass does not cover; OSError."""
    config = read_part(path.parent, QwenImage21Config, TRANSFORMER)
    if (config.out_channels or config.in_channels) != config.in_channels:
        raise fault(path, f": out_channels {config.out_channels} must equal in_channels {config.in_channels}")
    if not config.causal_condition:
        raise fault(path, ": causal_condition false is not supported")
    if config.eps != EPSILON:
        raise fault(path, f": eps {config.eps:g} is not supported ({EPSILON:g} is)")
    check_axes(path, config.axes_dims_rope, config.attention_head_dim)
    return config


def read_levels(folder: Path) -> tuple[float, ...] | None:
    """The noise levels that the checkpoint lists, before they are shifted. Raises CheckpointError; OSError."""
    return convert(folder / INDEX_FILE, read_object(folder / INDEX_FILE), _Index).sample_sigmas


def weights_plan(config: QwenImage21Config) -> WeightsPlan:
    """Name in a worker's memory -> tensors of a diffusers checkpoint: q, k, v fused, and an MLP's inner layers."""
    C, plan = config.hidden_size, WeightsPlan()
    plan.linear("image_in", ["img_in"], C, config.in_channels, has_bias=False)
    plan.vector("text_norm", "txt_in.text_norm.weight", config.context_in_dim)
    plan.linear("text_in.in_layer", ["txt_in.in_layer"], C, config.context_in_dim, has_bias=False)
    plan.linear("text_in.out_layer", ["txt_in.out_layer"], C, C, has_bias=False)
    plan.embedder("time_in", "time_text_embed.timestep_embedder", TIME_CHANNELS, C, has_bias=False)
    plan.linear("modulation", ["modulation.1"], 4 * C, C, has_bias=False)
    for i in range(config.num_layers):
        block = f"transformer_blocks.{i}"
        plan.linear(f"block.{i}.qkv", [f"{block}.attn.to_{x}" for x in "qkv"], 3 * C, C, has_bias=False)
        for x in "qk":
            plan.vector(f"block.{i}.{x}_norm", f"{block}.attn.norm_{x}.weight", config.attention_head_dim)
        plan.linear(f"block.{i}.out", [f"{block}.attn.to_out.0"], C, C, has_bias=False)
        inner = [f"{block}.img_mlp.{name}" for name in ("gate_layer", "proj")]
        plan.linear(f"block.{i}.mlp_in", inner, 2 * config.mlp_width, C, has_bias=False)
        plan.linear(f"block.{i}.mlp_out", [f"{block}.img_mlp.out"], C, config.mlp_width, has_bias=False)
    plan.linear("final_scale", ["norm_out.linear"], C, C, has_bias=False)
    plan.linear("final", ["proj_out"], config.in_channels, C, has_bias=False)
    return plan


class QwenImage21:
    def read(self, folder: Path, load_format: LoadFormat) -> ModelSpec:
        check_classes(folder, CLASSES)
        check_complete(
            folder,
            load_format,
            configs=(SCHEDULER_FILE, *(f"{component}/config.json" for component in WITH_WEIGHTS)),
            tokenizers={"processor": QWEN_TOKENIZER},
            with_weights=WITH_WEIGHTS,
        )
        levels, scheduler = read_levels(folder), read_scheduler(folder)
        preset = read_preset(folder, _preset(levels))
        transformer = read_config(component_folder(folder, "transformer") / "config.json")
        vae = read_part(component_folder(folder, "vae"), QwenImage21VaeConfig, VAE_CLASS)
        encoder, language = _read_language(folder, preset)
        if load_format != "dummy":
            _check_files(folder, transformer, vae, language)
        if vae.z_dim != transformer.in_channels:
            raise fault(
                component_folder(folder, "vae"),
                f" has {vae.z_dim} latent channels, the transformer's tokens {transformer.in_channels}"
                f" (vae/config.json: z_dim {vae.z_dim}, transformer/config.json: in_channels"
                f" {transformer.in_channels})",
            )
        check_width(encoder, "hidden_size", language.hidden_size, "context_in_dim", transformer.context_in_dim)
        sizes = Sizes(
            min=preset.min_size,
            max=preset.max_size,
            multiple=2 * SCALE_FACTOR,
            default=(preset.default_width, preset.default_height),
            rows_each=ROWS_EACH,
        )
        check_shifts(folder, scheduler, check_sizes(folder, sizes))
        return ModelSpec(
            name=model_name(folder, preset),
            path=str(folder.resolve()),
            family="qwenimage21",
            num_heads=transformer.num_attention_heads,
            head_dim=transformer.attention_head_dim,
            segments=("image", "text"),
            fields=(
                SlotField(name="text", rows="text", width=transformer.hidden_size, per_branch=True),
                SlotField(name="latents", rows="image", width=transformer.in_channels, fp32=True, changes=True),
            ),
            max_branches=2,
            prefix_blocks=transformer.num_layers,
            scheduler=scheduler,
            num_steps=preset.num_steps,
            guidance=preset.guidance or 1.0,
            max_text_tokens=preset.max_text_tokens,
            sizes=sizes,
            inputs=frozenset({"negative_prompt"}),
            weights=(
                ("transformer", num_planned(weights_plan(transformer))),
                ("vae", num_weights(decoder_shapes(vae).values())),
                ("text_encoder", num_weights(language_shapes(language, language.num_hidden_layers).values())),
            ),
        )

    def check(self, spec: ModelSpec, request: ImageRequest) -> None:
        """A negative prompt that nothing would look at is refused."""
        if request.negative_prompt is not None and not _is_guided(request):
            raise RequestError("negative_prompt", "takes a guidance above 1 to go with it")

    def shape(self, spec: ModelSpec, request: ImageRequest) -> StepShape:
        """Guidance without a negative prompt is no reason for a second branch, as in diffusers' pipeline."""
        assert request.width is not None and request.height is not None
        reader = prompt_reader(Path(spec.path))
        prompts = [request.prompt, *([request.negative_prompt or ""] if _is_guided(request) else [])]
        text = tuple(reader.num_rows(prompt or EMPTY) for prompt in prompts)
        return msgspec.structs.replace(spec.shape(request.width, request.height), text=text)


@functools.lru_cache(maxsize=8)
def prompt_reader(folder: Path) -> PromptReader:
    """Of the checkpoint in `folder`. Raises CheckpointError; OSError."""
    return _prompt_reader(folder)


def _prompt_reader(folder: Path) -> PromptReader:
    """As its files are now."""
    preset = read_preset(folder, PRESET)
    _, language = _read_language(folder, preset)
    tokenizer, num_dropped = component_folder(folder, "processor"), DROPPED_WITHOUT_TOKENIZER
    if has_vocabulary(tokenizer):
        num_dropped = len(load_tokenizer(tokenizer).encode(SYSTEM, add_special_tokens=False).ids)
    num_tokens = num_dropped + preset.max_text_tokens
    reader = PromptReader(tokenizer, CHAT, language.vocab_size, num_tokens, num_dropped)
    reader.pads_left = False  # rows of padding are not looked at, and a prompt's own are to come first
    return reader


def _preset(levels: tuple[float, ...] | None) -> Preset:
    return PRESET if levels is None else msgspec.structs.replace(PRESET, num_steps=len(levels))


def _is_guided(request: ImageRequest) -> bool:
    assert request.guidance is not None
    return request.guidance > 1 and request.negative_prompt is not None


def _read_language(folder: Path, preset: Preset) -> tuple[Path, LanguageConfig]:
    encoder = component_folder(folder, "text_encoder")
    return encoder, read_qwen3_vl(encoder, 1, preset.max_text_tokens)


def _check_files(
    folder: Path, transformer: QwenImage21Config, vae: QwenImage21VaeConfig, language: LanguageConfig
) -> None:
    """Weights and tokenizer by what their configs mean. Raises CheckpointError; OSError."""
    folders = {name: component_folder(folder, name) for name in WITH_WEIGHTS}
    tokenizer = component_folder(folder, "processor")
    check_tokenizer(tokenizer, QWEN_TOKENIZER, language.vocab_size)
    check_template(tokenizer, CHAT)
    reader = _prompt_reader(folder)
    if (num_tokens := len(reader.read(EMPTY).ids)) <= reader.num_dropped:
        raise fault(
            tokenizer, f" makes {num_tokens} tokens of an empty prompt, of which {reader.num_dropped} are dropped"
        )
    if reader.max_tokens > language.max_position_embeddings:
        raise fault(
            folders["text_encoder"],
            f": max_position_embeddings {language.max_position_embeddings} must be at least {reader.max_tokens}",
        )
    check_plan(weights_plan(transformer), read_shapes(folders["transformer"]), folders["transformer"])
    check_autoencoder(folders["vae"], vae, read_shapes(folders["vae"]))
    encoder = folders["text_encoder"]
    check_language(encoder, language, language.num_hidden_layers, read_shapes(encoder))


FAMILY: Family = QwenImage21()
