"""Krea 2 and Krea 2 Turbo, for the engine.

Both have the same networks; `is_distilled` in model_index.json tells which it is. The guidance is how much is added of
the difference that the prompt makes: 0 is none, 4.5 is what others call 5.5.

A text has as many rows as its prompt has tokens, with what of the form is kept. Queries have more heads than keys and
values: a group shares out the latter.
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
    INDEX_FILE,
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
    read_json,
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
from tetrion.engine.families.files import fault
from tetrion.engine.families.library_shapes import check_language, language_shapes
from tetrion.engine.families.plan import TIME_CHANNELS, WeightsPlan, check_plan, num_planned, num_weights
from tetrion.engine.families.prompts import DESCRIBED, NUM_BEFORE_DESCRIBED, PromptReader, check_template
from tetrion.engine.families.qwen_image_vae import (
    VAE_CLASS,
    QwenImageVaeConfig,
    check_autoencoder,
    check_latents,
    decoder_shapes,
    frame_shapes,
)
from tetrion.engine.families.tokenizers import QWEN_TOKENIZER, check_tokenizer
from tetrion.engine.families.weights import read_shapes
from tetrion.engine.model_spec import ModelSpec, Sizes, SlotField
from tetrion.engine.request import ImageRequest
from tetrion.engine.shape import StepShape

WITH_WEIGHTS = ("transformer", "vae", "text_encoder")
TRANSFORMER = "Krea2Transformer2DModel"
CLASSES = {
    "transformer": (TRANSFORMER,),
    "vae": (VAE_CLASS,),
    "text_encoder": QWEN3_VLS[::-1],
    "tokenizer": QWEN_TOKENIZER.classes,
    "scheduler": (SCHEDULER,),
}
BASE = Preset(num_steps=28, guidance=4.5, max_text_tokens=512)
TURBO = Preset(num_steps=8, guidance=None, max_text_tokens=512)
TURBO_SHIFT = 1.15
"""Of its noise levels, whatever the size."""
LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
CHAT, NUM_DROPPED = DESCRIBED, NUM_BEFORE_DESCRIBED
NUM_BEHIND = 5
"""Tokens behind it, which are kept of a prompt that is cut."""
PATCH = 2
"""A row of the image segment covers 2 × 2 latent pixels."""
VECTORS = 6
"""Of a block: scale, shift and gate of attention, then of the MLP."""
VECTORS_AT_END = 2
"""Scale, then shift."""


class Krea2Config(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of `transformer/config.json` (diffusers' names) that decide the computation. `text_…`: of the network
    that makes one text of the language model's layers."""

    in_channels: Size = 64
    num_layers: Count = 28
    attention_head_dim: Size = 128
    num_attention_heads: Size = 48
    num_key_value_heads: Size = 12
    intermediate_size: Size = 16384
    timestep_embed_dim: Literal[256] = 256
    text_hidden_dim: Size = 2560
    num_text_layers: Count = 12
    text_num_attention_heads: Size = 20
    text_num_key_value_heads: Size = 20
    text_intermediate_size: Size = 6912
    num_layerwise_text_blocks: Annotated[int, Meta(ge=0, le=1000)] = 2
    num_refiner_text_blocks: Annotated[int, Meta(ge=0, le=1000)] = 2
    axes_dims_rope: Annotated[tuple[Size, ...], Meta(min_length=3, max_length=3)] = (32, 48, 48)
    rope_theta: Annotated[float, Meta(gt=0, le=1e9)] = 1000.0
    norm_eps: Annotated[float, Meta(ge=0, le=1)] = 1e-5

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def heads_per_key(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def text_head_dim(self) -> int:
        return self.text_hidden_dim // self.text_num_attention_heads

    @property
    def text_blocks(self) -> tuple[str, ...]:
        """Those over the layers of each token, then those over tokens."""
        return (
            *(f"text_fusion.layerwise_blocks.{i}" for i in range(self.num_layerwise_text_blocks)),
            *(f"text_fusion.refiner_blocks.{i}" for i in range(self.num_refiner_text_blocks)),
        )

    @property
    def num_vectors(self) -> int:
        """V: scales, shifts and gates of all blocks, each [C]."""
        return VECTORS * self.num_layers + VECTORS_AT_END

    def __post_init__(self) -> None:
        for keys, heads in (
            ("num_key_value_heads", "num_attention_heads"),
            ("text_num_key_value_heads", "text_num_attention_heads"),
            ("text_num_attention_heads", "text_hidden_dim"),
        ):
            if getattr(self, heads) % getattr(self, keys):
                raise ValueError(f"{keys} {getattr(self, keys)} must divide {heads} {getattr(self, heads)}")


class _Index(msgspec.Struct, frozen=True, kw_only=True):
    """What `model_index.json` says beside its components."""

    text_encoder_select_layers: Annotated[tuple[Annotated[int, Meta(ge=1, le=1000)], ...], Meta(max_length=1000)] = (
        LAYERS
    )
    is_distilled: bool = False
    patch_size: Literal[2] = 2


def read_config(path: Path) -> Krea2Config:
    """Read `transformer/config.json`. Raises CheckpointError for what the forward pass does not cover; OSError."""
    config = read_part(path.parent, Krea2Config, TRANSFORMER)
    check_axes(path, config.axes_dims_rope, config.attention_head_dim)
    return config


def read_index(folder: Path) -> _Index:
    """Raises CheckpointError; OSError."""
    found = {name: value for name, value in read_json(folder, INDEX_FILE).items() if value is not None}
    return convert(folder / INDEX_FILE, found, _Index)


def weights_plan(config: Krea2Config) -> WeightsPlan:
    """Name in a worker's memory -> tensors of a diffusers checkpoint: q, k, v and the output's gate fused, an MLP's two
    inner layers fused."""
    C, W, plan = config.hidden_size, config.text_hidden_dim, WeightsPlan()
    plan.linear("image_in", ["img_in"], C, config.in_channels)
    plan.embedder("time_in", "time_embed", TIME_CHANNELS, C)
    plan.linear("modulation", ["time_mod_proj"], VECTORS * C, C)
    for block in config.text_blocks:
        heads = config.text_num_attention_heads, config.text_num_key_value_heads, config.text_head_dim
        _block(plan, block, W, *heads, config.text_intermediate_size)
    plan.matrix("text_fusion.projector", "text_fusion.projector.weight", 1, config.num_text_layers)
    plan.vector("text_norm", "txt_in.norm.weight", W)
    plan.embedder("text_in", "txt_in", W, C)
    for i in range(config.num_layers):
        block = f"transformer_blocks.{i}"
        heads = config.num_attention_heads, config.num_key_value_heads, config.attention_head_dim
        _block(plan, block, C, *heads, config.intermediate_size)
        plan.matrix(f"{block}.vectors", f"{block}.scale_shift_table", VECTORS, C)
    plan.matrix("final.vectors", "final_layer.scale_shift_table", VECTORS_AT_END, C)
    plan.vector("final.norm", "final_layer.norm.weight", C)
    plan.linear("final", ["final_layer.linear"], config.in_channels, C)
    return plan


def _block(plan: WeightsPlan, block: str, width: int, heads: int, key_heads: int, head_dim: int, inner: int) -> None:
    attn, outputs = f"{block}.attn", (2 * heads + 2 * key_heads) * head_dim
    plan.linear(
        f"{block}.qkv_gate", [f"{attn}.to_{x}" for x in ("q", "k", "v", "gate")], outputs, width, has_bias=False
    )
    for x in "qk":
        plan.vector(f"{block}.{x}_norm", f"{attn}.norm_{x}.weight", head_dim)
    plan.linear(f"{block}.out", [f"{attn}.to_out.0"], width, width, has_bias=False)
    plan.linear(f"{block}.mlp_in", [f"{block}.ff.gate", f"{block}.ff.up"], 2 * inner, width, has_bias=False)
    plan.linear(f"{block}.mlp_out", [f"{block}.ff.down"], width, inner, has_bias=False)
    for norm in ("norm1", "norm2"):
        plan.vector(f"{block}.{norm}", f"{block}.{norm}.weight", width)


class Krea2:
    def read(self, folder: Path, load_format: LoadFormat) -> ModelSpec:
        check_classes(folder, CLASSES)
        check_complete(
            folder,
            load_format,
            configs=(SCHEDULER_FILE, *(f"{component}/config.json" for component in WITH_WEIGHTS)),
            tokenizers={"tokenizer": QWEN_TOKENIZER},
            with_weights=WITH_WEIGHTS,
        )
        index, scheduler = read_index(folder), read_scheduler(folder)
        preset = read_preset(folder, TURBO if index.is_distilled else BASE)
        if preset.max_text_tokens <= NUM_BEHIND:
            raise fault(
                folder / PRESET_FILE, f": max_text_tokens {preset.max_text_tokens} must be more than {NUM_BEHIND}"
            )
        transformer = read_config(component_folder(folder, "transformer") / "config.json")
        if len(index.text_encoder_select_layers) != transformer.num_text_layers:
            raise fault(
                folder / INDEX_FILE,
                f": text_encoder_select_layers {len(index.text_encoder_select_layers)} must be as many as the"
                f" transformer's num_text_layers {transformer.num_text_layers}",
            )
        vae = read_part(component_folder(folder, "vae"), QwenImageVaeConfig, VAE_CLASS)
        encoder, language = _read_language(folder, preset)
        if load_format != "dummy":
            _check_files(folder, transformer, vae, language)
        check_latents(component_folder(folder, "vae"), vae, transformer.in_channels)
        check_width(encoder, "hidden_size", language.hidden_size, "text_hidden_dim", transformer.text_hidden_dim)
        sizes = Sizes(
            min=preset.min_size,
            max=preset.max_size,
            multiple=PATCH * vae.scale_factor,
            default=(preset.default_width, preset.default_height),
        )
        check_shifts(folder, scheduler, check_sizes(folder, sizes))
        return ModelSpec(
            name=model_name(folder, preset),
            path=str(folder.resolve()),
            family="krea2",
            num_heads=transformer.num_attention_heads,
            heads_per_key=transformer.heads_per_key,
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
            inputs=frozenset({"negative_prompt"}),
            weights=(
                ("transformer", num_planned(weights_plan(transformer))),
                ("vae", num_weights(frame_shapes(decoder_shapes(vae)).values())),
                ("text_encoder", num_weights(language_shapes(language, max(layers(folder))).values())),
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
        text = tuple(reader.num_rows(prompt) for prompt in prompts)
        return msgspec.structs.replace(spec.shape(request.width, request.height), text=text)


def layers(folder: Path) -> tuple[int, ...]:
    """Of the text encoder, whose outputs are looked at; 1 is the first's. The last one has more behind it."""
    return read_index(folder).text_encoder_select_layers


@functools.lru_cache(maxsize=8)
def prompt_reader(folder: Path) -> PromptReader:
    """Of the checkpoint in `folder`. Raises CheckpointError; OSError."""
    return _prompt_reader(folder)


def _prompt_reader(folder: Path) -> PromptReader:
    """As its files are now."""
    preset = read_preset(folder, BASE)
    _, language = _read_language(folder, preset)
    max_tokens, tokenizer = NUM_DROPPED + preset.max_text_tokens, component_folder(folder, "tokenizer")
    reader = PromptReader(tokenizer, CHAT, language.vocab_size, max_tokens, NUM_DROPPED, keeps_end=True)
    reader.pads_left = False  # rows of padding are not looked at, and a prompt's own are to come first
    return reader


def _is_guided(request: ImageRequest) -> bool:
    assert request.guidance is not None
    return request.guidance > 0


def _read_language(folder: Path, preset: Preset) -> tuple[Path, LanguageConfig]:
    """The language model has a layer behind those that are looked at, since the last one's output is normed."""
    encoder = component_folder(folder, "text_encoder")
    num_tokens = NUM_DROPPED + preset.max_text_tokens
    return encoder, read_qwen3_vl(encoder, num_layers=max(layers(folder)) + 1, max_tokens=num_tokens)


def _check_files(folder: Path, transformer: Krea2Config, vae: QwenImageVaeConfig, language: LanguageConfig) -> None:
    """Weights and tokenizer by what their configs mean. Raises CheckpointError; OSError."""
    folders = {name: component_folder(folder, name) for name in WITH_WEIGHTS}
    check_tokenizer(component_folder(folder, "tokenizer"), QWEN_TOKENIZER, language.vocab_size)
    check_template(component_folder(folder, "tokenizer"), CHAT)
    _prompt_reader(folder)
    check_plan(weights_plan(transformer), read_shapes(folders["transformer"]), folders["transformer"])
    check_autoencoder(folders["vae"], vae, read_shapes(folders["vae"]))
    encoder = folders["text_encoder"]
    check_language(encoder, language, max(layers(folder)), read_shapes(encoder))


FAMILY: Family = Krea2()
