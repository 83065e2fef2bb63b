"""Z-Image and Z-Image-Turbo, for the engine.

Both have the same networks; without a preset the scheduler tells which it is: Turbo's noise levels are shifted by 3,
the base model's by 6. The guidance is how much is added of the difference that the prompt makes: 0 is none, 5 is what
others call 6.

A text has as many rows as its prompt has tokens, filled up to a multiple of 32; so has the picture.
"""

import functools
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from tetrion.engine.config import LoadFormat
from tetrion.engine.errors import RequestError, shown
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
    QWEN3S,
    Count,
    LanguageConfig,
    Size,
    VaeConfig,
    check_latents,
    check_width,
    read_part,
    read_qwen3,
)
from tetrion.engine.families.files import fault
from tetrion.engine.families.library_shapes import (
    check_autoencoder,
    check_language,
    decoder_shapes,
    encoder_shapes,
    language_shapes,
)
from tetrion.engine.families.pictures import picture_inputs, picture_limits
from tetrion.engine.families.plan import TIME_CHANNELS, WeightsPlan, check_plan, num_planned, num_weights
from tetrion.engine.families.prompts import ChatForm, PromptReader, check_template
from tetrion.engine.families.tokenizers import QWEN_TOKENIZER, check_tokenizer
from tetrion.engine.families.weights import read_shapes
from tetrion.engine.model_spec import ModelSpec, Sizes, SlotField
from tetrion.engine.request import ImageRequest
from tetrion.engine.shape import StepShape

WITH_WEIGHTS = ("transformer", "vae", "text_encoder")
TRANSFORMER = "ZImageTransformer2DModel"
CLASSES = {
    "transformer": (TRANSFORMER,),
    "vae": ("AutoencoderKL",),
    "text_encoder": QWEN3S,
    "tokenizer": QWEN_TOKENIZER.classes,
    "scheduler": (SCHEDULER,),
}
BASE = Preset(num_steps=50, guidance=5.0, max_text_tokens=512)
TURBO = Preset(num_steps=8, guidance=None, max_text_tokens=512)
TURBO_SHIFT = 3.0
CHAT = ChatForm("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
ROW_MULTIPLE = 32
"""Both segments' rows are filled up to a multiple of this, with rows that are attended to."""
PATCH = 2
"""A row of the image segment covers 2 × 2 latent pixels."""
MAX_TIME_WIDTH, TIME_MLP = 256, 1024
VECTORS = 4
"""Of a block: factor and gate of attention, then of the MLP."""
VECTORS_AT_END = 2
"""Shift (zeros), then scale."""
NORMS = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
"""Of a block: before and behind attention, before and behind the MLP."""
_Axes = Annotated[tuple[Size, ...], Meta(min_length=3, max_length=3)]


class ZImageConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of `transformer/config.json` (diffusers' names) that decide the computation. `axes_lens`: beyond the
    last position of text, row and column."""

    in_channels: Size = 16
    dim: Size = 3840
    n_layers: Count = 30
    n_refiner_layers: Annotated[int, Meta(ge=0, le=1000)] = 2
    n_heads: Size = 30
    n_kv_heads: Size = 30
    norm_eps: Annotated[float, Meta(ge=0, le=1)] = 1e-5
    qk_norm: Literal[True] = True
    cap_feat_dim: Size = 2560
    siglip_feat_dim: None = None
    rope_theta: Annotated[float, Meta(gt=0, le=1e9)] = 256.0
    t_scale: Annotated[float, Meta(gt=0, le=1e6)] = 1000.0
    axes_dims: _Axes = (32, 48, 48)
    axes_lens: _Axes = (1024, 512, 512)
    all_patch_size: Annotated[tuple[Literal[2], ...], Meta(min_length=1, max_length=1)] = (2,)
    all_f_patch_size: Annotated[tuple[Literal[1], ...], Meta(min_length=1, max_length=1)] = (1,)

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def mlp_width(self) -> int:
        return int(self.dim / 3 * 8)

    @property
    def time_width(self) -> int:
        return min(self.dim, MAX_TIME_WIDTH)

    @property
    def token_width(self) -> int:
        """Channels of an image token."""
        return PATCH * PATCH * self.in_channels

    @property
    def stepped_blocks(self) -> tuple[str, ...]:
        """Those that depend on the step: the image's refiners, then the layers."""
        return (
            *(f"noise_refiner.{i}" for i in range(self.n_refiner_layers)),
            *(f"layers.{i}" for i in range(self.n_layers)),
        )

    @property
    def text_blocks(self) -> tuple[str, ...]:
        return tuple(f"context_refiner.{i}" for i in range(self.n_refiner_layers))

    @property
    def num_vectors(self) -> int:
        """V: factors and gates of all blocks, each [C]."""
        return VECTORS * len(self.stepped_blocks) + VECTORS_AT_END


def read_config(path: Path) -> ZImageConfig:
    """Read `transformer/config.json`. Raises CheckpointError for what the forward pass does not cover; OSError."""
    config = read_part(path.parent, ZImageConfig, TRANSFORMER)
    if config.n_kv_heads != config.n_heads:
        raise fault(path, f": n_kv_heads {config.n_kv_heads} must equal n_heads {config.n_heads}")
    if config.dim % config.n_heads or sum(config.axes_dims) != config.head_dim:
        raise fault(
            path,
            f": axes_dims {shown(list(config.axes_dims))} must add up to dim / n_heads = {config.dim} /"
            f" {config.n_heads}",
        )
    if any(dim % 2 for dim in config.axes_dims):
        raise fault(path, f": axes_dims {list(config.axes_dims)} must be even")
    return config


def weights_plan(config: ZImageConfig) -> WeightsPlan:
    """Name in a worker's memory -> tensors of a diffusers checkpoint: q, k, v fused, an MLP's two inner layers fused,
    all modulations fused, image tokens (c, p, q) on both sides, as latents are packed."""
    C, plan, embedder, final = config.dim, WeightsPlan(), f"{PATCH}-1", f"all_final_layer.{PATCH}-1"
    plan.pixels_in("image_in", f"all_x_embedder.{embedder}", C, config.in_channels, PATCH)
    plan.vector("text_norm", "cap_embedder.0.weight", config.cap_feat_dim)
    plan.linear("text_in", ["cap_embedder.1"], C, config.cap_feat_dim)
    plan.linear("time_in.in_layer", ["t_embedder.mlp.0"], TIME_MLP, TIME_CHANNELS)
    plan.linear("time_in.out_layer", ["t_embedder.mlp.2"], config.time_width, TIME_MLP)
    plan.matrix("image_padding", "x_pad_token", 1, C)
    plan.matrix("text_padding", "cap_pad_token", 1, C)
    for block in (*config.text_blocks, *config.stepped_blocks):
        attention, mlp = f"{block}.attention", f"{block}.feed_forward"
        plan.linear(f"{block}.qkv", [f"{attention}.to_{x}" for x in "qkv"], 3 * C, C, has_bias=False)
        for x in "qk":
            plan.vector(f"{block}.{x}_norm", f"{attention}.norm_{x}.weight", config.head_dim)
        plan.linear(f"{block}.out", [f"{attention}.to_out.0"], C, C, has_bias=False)
        plan.linear(f"{block}.mlp_in", [f"{mlp}.w1", f"{mlp}.w3"], 2 * config.mlp_width, C, has_bias=False)
        plan.linear(f"{block}.mlp_out", [f"{mlp}.w2"], C, config.mlp_width, has_bias=False)
        for norm in NORMS:
            plan.vector(f"{block}.{norm}", f"{block}.{norm}.weight", C)
    blocks = [f"{block}.adaLN_modulation.0" for block in config.stepped_blocks]
    plan.linear("modulation", blocks, VECTORS * len(blocks) * C, config.time_width)
    plan.linear("final_scale", [f"{final}.adaLN_modulation.1"], C, config.time_width)
    plan.patches_out("final", f"{final}.linear", config.in_channels, PATCH, C)
    return plan


class ZImage:
    def read(self, folder: Path, load_format: LoadFormat) -> ModelSpec:
        check_classes(folder, CLASSES)
        check_complete(
            folder,
            load_format,
            configs=(SCHEDULER_FILE, *(f"{component}/config.json" for component in WITH_WEIGHTS)),
            tokenizers={"tokenizer": QWEN_TOKENIZER},
            with_weights=WITH_WEIGHTS,
        )
        scheduler = read_scheduler(folder)
        preset = read_preset(folder, TURBO if scheduler.shift <= TURBO_SHIFT else BASE)
        transformer = read_config(component_folder(folder, "transformer") / "config.json")
        vae = read_part(component_folder(folder, "vae"), VaeConfig, "AutoencoderKL")
        encoder, language = _read_language(folder, preset)
        if load_format != "dummy":
            _check_files(folder, transformer, vae, language)
        check_latents(component_folder(folder, "vae"), vae, transformer.in_channels, 1)
        check_width(encoder, "hidden_size", language.hidden_size, "cap_feat_dim", transformer.cap_feat_dim)
        sizes = Sizes(
            min=preset.min_size,
            max=preset.max_size,
            multiple=PATCH * vae.scale_factor,
            default=(preset.default_width, preset.default_height),
            row_multiple=ROW_MULTIPLE,
        )
        check_shifts(folder, scheduler, check_sizes(folder, sizes))
        _check_positions(folder, transformer, sizes, preset)
        row, inputs = transformer.dim, picture_inputs(folder, load_format)
        vae_shapes = decoder_shapes(vae) | (encoder_shapes(vae) if "pictures" in inputs else {})
        return ModelSpec(
            name=model_name(folder, preset),
            path=str(folder.resolve()),
            family="zimage",
            num_heads=transformer.n_heads,
            head_dim=transformer.head_dim,
            segments=("image", "text"),
            fields=(
                SlotField(name="text", rows="text", width=row, per_branch=True),
                SlotField(name="latents", rows="image", width=transformer.token_width, fp32=True, changes=True),
            ),
            max_branches=2,
            scheduler=scheduler,
            num_steps=preset.num_steps,
            guidance=preset.guidance or 0.0,
            max_text_tokens=preset.max_text_tokens,
            sizes=sizes,
            inputs=frozenset({"negative_prompt"}) | inputs,
            **picture_limits(folder, load_format),
            weights=(
                ("transformer", num_planned(weights_plan(transformer))),
                ("vae", num_weights(vae_shapes.values())),
                ("text_encoder", num_weights(language_shapes(language, num_encoder_layers(language)).values())),
            ),
        )

    def check(self, spec: ModelSpec, request: ImageRequest) -> None:
        """A negative prompt that nothing would look at is refused."""
        if request.negative_prompt is not None and not _is_guided(request):
            raise RequestError("negative_prompt", "takes a guidance above 0 to go with it")

    def shape(self, spec: ModelSpec, request: ImageRequest) -> StepShape:
        assert request.width is not None and request.height is not None
        reader = prompt_reader(Path(spec.path))
        prompts = [request.prompt, *([request.negative_prompt or ""] if _is_guided(request) else [])]
        text = tuple(filled(len(reader.read(prompt).ids)) for prompt in prompts)
        return msgspec.structs.replace(spec.shape(request.width, request.height), text=text)


def filled(num_rows: int) -> int:
    """With the rows that fill a segment up."""
    return -(-num_rows // ROW_MULTIPLE) * ROW_MULTIPLE


def num_encoder_layers(language: LanguageConfig) -> int:
    """How many of the text encoder's layers are run: what the last but one gives is taken."""
    return language.num_hidden_layers - 1


@functools.lru_cache(maxsize=8)
def prompt_reader(folder: Path) -> PromptReader:
    """Of the checkpoint in `folder`. Raises CheckpointError; OSError."""
    return _prompt_reader(folder)


def _prompt_reader(folder: Path) -> PromptReader:
    """As its files are now."""
    preset = read_preset(folder, BASE)
    _, language = _read_language(folder, preset)
    reader = PromptReader(component_folder(folder, "tokenizer"), CHAT, language.vocab_size, preset.max_text_tokens)
    reader.pads_left = False  # rows of padding are not looked at, and a prompt's own are to come first
    return reader


def _is_guided(request: ImageRequest) -> bool:
    assert request.guidance is not None
    return request.guidance > 0


def _read_language(folder: Path, preset: Preset) -> tuple[Path, LanguageConfig]:
    encoder = component_folder(folder, "text_encoder")
    return encoder, read_qwen3(encoder, num_layers=2, max_tokens=preset.max_text_tokens)


def _check_files(folder: Path, transformer: ZImageConfig, vae: VaeConfig, language: LanguageConfig) -> None:
    """Weights and tokenizer by what their configs mean. Raises CheckpointError; OSError."""
    folders = {name: component_folder(folder, name) for name in WITH_WEIGHTS}
    check_tokenizer(component_folder(folder, "tokenizer"), QWEN_TOKENIZER, language.vocab_size)
    check_template(component_folder(folder, "tokenizer"), CHAT)
    _prompt_reader(folder)
    check_plan(weights_plan(transformer), read_shapes(folders["transformer"]), folders["transformer"])
    check_autoencoder(folders["vae"], vae, read_shapes(folders["vae"]))
    encoder = folders["text_encoder"]
    check_language(encoder, language, num_encoder_layers(language), read_shapes(encoder))


def _check_positions(folder: Path, transformer: ZImageConfig, sizes: Sizes, preset: Preset) -> None:
    """Raises CheckpointError for a preset that goes beyond what the transformer has positions for."""
    path, (text, *sides) = folder / PRESET_FILE, transformer.axes_lens
    if preset.max_text_tokens % ROW_MULTIPLE:
        raise fault(path, f": max_text_tokens {preset.max_text_tokens} must be a multiple of {ROW_MULTIPLE}")
    if preset.max_text_tokens + 1 >= text:
        raise fault(path, f": max_text_tokens {preset.max_text_tokens} must be below axes_lens {text} - 1")
    if sizes.max > min(sides) * sizes.multiple:
        raise fault(path, f": max_size {sizes.max} is beyond the {min(sides) * sizes.multiple} pixels of axes_lens")


FAMILY: Family = ZImage()
