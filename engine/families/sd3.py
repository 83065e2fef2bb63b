"""Stable Diffusion 3 and 3.5, for the engine: medium and large, with or without a T5.

Without a preset the model cards' guidance holds, of the version that the transformer's config tells: 3.0 norms neither
q nor k, 3.5-medium alone has blocks with a second attention. What is distilled (3.5-large-turbo) has the same config as
3.5-large: its folder needs a preset.

Text is both CLIPs' rows side by side and T5's below them; a checkpoint without a T5 has as many rows of zeros.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from tetrion.engine.config import LoadFormat
from tetrion.engine.errors import RequestError, shown
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
    has_component,
    model_name,
    names_component,
    read_preset,
    read_scheduler,
)
from tetrion.engine.families.components import (
    ClipConfig,
    Count,
    Index,
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
from tetrion.engine.families.pictures import picture_inputs, picture_limits
from tetrion.engine.families.plan import (
    TIME_CHANNELS,
    Part,
    Rearranged,
    WeightsPlan,
    check_plan,
    num_planned,
    num_weights,
)
from tetrion.engine.families.tokenizers import (
    CLIP_TOKENIZER,
    T5_TOKENIZER,
    check_tokenizer,
    has_vocabulary,
    max_prompt_tokens,
)
from tetrion.engine.families.weights import read_shapes
from tetrion.engine.model_spec import ModelSpec, Sizes, SlotField
from tetrion.engine.request import ImageRequest
from tetrion.engine.shape import StepShape

CLIPS, T5 = ("text_encoder", "text_encoder_2"), "text_encoder_3"
TOKENIZER_OF = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}
TRANSFORMER = "SD3Transformer2DModel"
CLASSES = {
    "transformer": (TRANSFORMER,),
    "vae": ("AutoencoderKL",),
    **dict.fromkeys(CLIPS, ("CLIPTextModelWithProjection",)),
    **{TOKENIZER_OF[clip]: CLIP_TOKENIZER.classes for clip in CLIPS},
    "scheduler": (SCHEDULER,),
}
CLASSES_OF_T5 = {T5: ("T5EncoderModel",), TOKENIZER_OF[T5]: T5_TOKENIZER.classes}
V3_MEDIUM = Preset(guidance=7.0, max_text_tokens=256)
"""`max_text_tokens`: T5's alone, here and in a preset file."""
V35_MEDIUM = Preset(guidance=4.5, max_text_tokens=256)
V35_LARGE = Preset(guidance=3.5, max_text_tokens=256)
LATENTS_PER_ROW = 2
"""A row of the image segment covers 2 × 2 latent pixels."""
MLP_RATIO = 4
VECTORS = 6
"""Of a stream in a block: shift, scale, gate of attention, then of the MLP."""
VECTORS_DUAL = 9
"""Of an image stream with a second attention: its shift, scale, gate come last."""
VECTORS_AT_END = 2
"""Scale, then shift: of the last block's text, which has no output, and of the image behind all blocks."""
_Side = Annotated[int, Meta(ge=1, le=4096)]


class SD3Config(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of `transformer/config.json` (diffusers' names) that decide the computation.

    `pos_embed_max_size`: the longest side of a picture, in tokens.
    """

    in_channels: Size
    num_layers: Count
    attention_head_dim: Size
    num_attention_heads: Size
    joint_attention_dim: Size
    caption_projection_dim: Size
    pooled_projection_dim: Size
    pos_embed_max_size: _Side
    patch_size: Literal[2] = 2
    out_channels: int | None = None
    dual_attention_layers: Annotated[tuple[Index, ...], Meta(max_length=1000)] = ()
    qk_norm: Literal["rms_norm"] | None = None
    sample_size: _Side = 128

    @property
    def preset(self) -> Preset:
        if self.qk_norm is None:
            return V3_MEDIUM
        return V35_MEDIUM if self.dual_attention_layers else V35_LARGE

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def token_width(self) -> int:
        """Channels of an image token."""
        return self.patch_size**2 * self.in_channels

    @property
    def num_vectors(self) -> int:
        """V: shifts, scales and gates of all blocks, each [C]."""
        blocks = range(self.num_layers)
        return sum(self.text_vectors(i) + self.image_vectors(i) for i in blocks) + VECTORS_AT_END

    def is_last(self, block: int) -> bool:
        return block == self.num_layers - 1

    def text_vectors(self, block: int) -> int:
        return VECTORS_AT_END if self.is_last(block) else VECTORS

    def image_vectors(self, block: int) -> int:
        return VECTORS_DUAL if block in self.dual_attention_layers else VECTORS


def read_config(path: Path) -> SD3Config:
    """Read `transformer/config.json`. Raises CheckpointError for what the forward pass does not cover; OSError."""
    config = read_part(path.parent, SD3Config, TRANSFORMER)
    if config.out_channels not in (None, config.in_channels):
        raise fault(path, f": out_channels {config.out_channels} must equal in_channels {config.in_channels}")
    if config.caption_projection_dim != config.hidden_size:
        raise fault(
            path,
            f": caption_projection_dim {config.caption_projection_dim} must equal"
            f" num_attention_heads · attention_head_dim = {config.hidden_size}",
        )
    if beyond := [block for block in config.dual_attention_layers if block >= config.num_layers]:
        raise fault(path, f": dual_attention_layers {shown(beyond)} are not below num_layers {config.num_layers}")
    return config


def weights_plan(config: SD3Config) -> WeightsPlan:
    """Name in a worker's memory -> tensors of a diffusers checkpoint: q, k, v fused, all modulation projections fused,
    image tokens (c, p, q) on both sides, as latents are packed."""
    C, side, plan = config.hidden_size, config.pos_embed_max_size, WeightsPlan()

    def add_projection(name: str, layers: Sequence[str], norms: Sequence[str]) -> None:
        plan.linear(f"{name}.qkv", layers, 3 * C, C)
        if config.qk_norm is not None:
            for norm, source in zip(("q_norm", "k_norm"), norms, strict=True):
                plan.vector(f"{name}.{norm}", f"{source}.weight", config.attention_head_dim)

    def add_image_projection(name: str, attn: str) -> None:
        add_projection(name, [f"{attn}.to_{x}" for x in "qkv"], [f"{attn}.norm_q", f"{attn}.norm_k"])

    def add_outputs(name: str, out: str, mlp: str) -> None:
        plan.linear(f"{name}.out", [out], C, C)
        plan.linear(f"{name}.mlp_in", [f"{mlp}.net.0.proj"], MLP_RATIO * C, C)
        plan.linear(f"{name}.mlp_out", [f"{mlp}.net.2"], C, MLP_RATIO * C)

    plan.patches_in("image_in", "pos_embed.proj", C, config.in_channels, config.patch_size)
    whole_table = (1, side * side, C)
    plan["positions"] = Part(("pos_embed.pos_embed",), whole_table, Rearranged(whole_table, (0, 1, 2), (side, side, C)))
    plan.linear("text_in", ["context_embedder"], C, config.joint_attention_dim)
    plan.embedder("time_in", "time_text_embed.timestep_embedder", TIME_CHANNELS, C)
    plan.embedder("pooled_in", "time_text_embed.text_embedder", config.pooled_projection_dim, C)
    modulation: list[str] = []
    for i in range(config.num_layers):
        ours, block = f"block.{i}", f"transformer_blocks.{i}"
        attn = f"{block}.attn"
        add_projection(
            f"{ours}.text_in",
            [f"{attn}.add_{x}_proj" for x in "qkv"],
            [f"{attn}.norm_added_q", f"{attn}.norm_added_k"],
        )
        add_image_projection(f"{ours}.image_in", attn)
        if not config.is_last(i):
            add_outputs(f"{ours}.text", f"{attn}.to_add_out", f"{block}.ff_context")
        add_outputs(f"{ours}.image", f"{attn}.to_out.0", f"{block}.ff")
        if i in config.dual_attention_layers:
            add_image_projection(f"{ours}.second", f"{block}.attn2")
            plan.linear(f"{ours}.second.out", [f"{block}.attn2.to_out.0"], C, C)
        modulation += [f"{block}.norm1_context.linear", f"{block}.norm1.linear"]
    plan.linear("modulation", [*modulation, "norm_out.linear"], config.num_vectors * C, C)
    plan.patches_out("final", "proj_out", config.in_channels, config.patch_size, C)
    return plan


class Sd3:
    def read(self, folder: Path, load_format: LoadFormat) -> ModelSpec:
        encoders = (*CLIPS, T5) if has_t5(folder) else CLIPS
        with_weights = ("transformer", "vae", *encoders)
        check_classes(folder, CLASSES | (CLASSES_OF_T5 if T5 in encoders else {}))
        check_complete(
            folder,
            load_format,
            configs=(SCHEDULER_FILE, *(f"{component}/config.json" for component in with_weights)),
            tokenizers={TOKENIZER_OF[it]: T5_TOKENIZER if it == T5 else CLIP_TOKENIZER for it in encoders},
            with_weights=with_weights,
        )
        scheduler = read_scheduler(folder)
        transformer = read_config(component_folder(folder, "transformer") / "config.json")
        vae = read_part(component_folder(folder, "vae"), VaeConfig, "AutoencoderKL")
        clips = [read_clip(component_folder(folder, name), is_projected=True) for name in CLIPS]
        t5 = read_t5(component_folder(folder, T5)) if T5 in encoders else None
        if load_format != "dummy":
            _check_files(folder, transformer, vae, clips, t5)
        _check_fit(folder, transformer, vae, clips, t5)
        sizes, preset = _limits(folder, transformer, LATENTS_PER_ROW * vae.scale_factor)
        check_shifts(folder, scheduler, sizes)
        row = transformer.hidden_size
        inputs = picture_inputs(folder, load_format)
        vae_shapes = decoder_shapes(vae) | (encoder_shapes(vae) if "pictures" in inputs else {})
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
                    width=transformer.token_width,
                    fp32=True,
                    changes=True,
                ),
            ),
            max_branches=2,
            scheduler=scheduler,
            num_steps=preset.num_steps,
            guidance=preset.guidance or 0.0,
            max_text_tokens=_num_clip_rows(folder, clips) + preset.max_text_tokens,
            sizes=sizes,
            inputs=frozenset({"negative_prompt"}) | inputs,
            **picture_limits(folder, load_format),
            weights=(
                ("transformer", num_planned(weights_plan(transformer))),
                ("vae", num_weights(vae_shapes.values())),
                *(
                    (name, num_weights(clip_shapes(clip, is_projected=True).values()))
                    for name, clip in zip(CLIPS, clips, strict=True)
                ),
                *(() if t5 is None else ((T5, num_weights(t5_shapes(t5, T5_EMBEDDINGS[0]).values())),)),
            ),
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
    """Whether the checkpoint has a third text encoder. Raises CheckpointError if it has one half of it."""
    has_encoder, has_tokenizer = has_component(folder, T5), has_component(folder, TOKENIZER_OF[T5])
    if has_encoder != has_tokenizer and (has_tokenizer or names_component(folder, TOKENIZER_OF[T5])):
        named, null = (T5, TOKENIZER_OF[T5]) if has_encoder else (TOKENIZER_OF[T5], T5)
        raise fault(folder / INDEX_FILE, f" has {named} without {null}; leave both out, or neither")
    return has_encoder


def _is_guided(request: ImageRequest) -> bool:
    assert request.guidance is not None
    return request.guidance > 1


def _check_files(
    folder: Path, transformer: SD3Config, vae: VaeConfig, clips: Sequence[ClipConfig], t5: T5Config | None
) -> None:
    """Weights and tokenizers by what their configs mean. Raises CheckpointError; OSError."""
    for name, clip in zip(CLIPS, clips, strict=True):
        tokenizer = component_folder(folder, TOKENIZER_OF[name])
        check_tokenizer(tokenizer, CLIP_TOKENIZER, clip.vocab_size)
        max_prompt_tokens(tokenizer, clip.max_position_embeddings)
    if t5 is not None:
        check_tokenizer(component_folder(folder, TOKENIZER_OF[T5]), T5_TOKENIZER, t5.vocab_size)
    path = component_folder(folder, "transformer")
    check_plan(weights_plan(transformer), read_shapes(path), path)
    path = component_folder(folder, "vae")
    check_autoencoder(path, vae, read_shapes(path))
    for name, clip in zip(CLIPS, clips, strict=True):
        path = component_folder(folder, name)
        check_clip(path, clip, read_shapes(path), is_projected=True)
    if t5 is not None:
        path = component_folder(folder, T5)
        check_t5(path, t5, read_shapes(path))


def _check_fit(
    folder: Path, transformer: SD3Config, vae: VaeConfig, clips: Sequence[ClipConfig], t5: T5Config | None
) -> None:
    """Raises CheckpointError unless components give what the transformer takes."""
    check_latents(component_folder(folder, "vae"), vae, transformer.in_channels, 1)
    widths = [clip.hidden_size for clip in clips]
    if sum(widths) > transformer.joint_attention_dim:
        raise fault(
            folder,
            f": text_encoder/config.json and text_encoder_2/config.json: rows of hidden_size {widths[0]} and"
            f" {widths[1]} side by side are wider than joint_attention_dim {transformer.joint_attention_dim} of"
            " transformer/config.json",
        )
    pooled = [clip.projection_dim for clip in clips]
    if sum(pooled) != transformer.pooled_projection_dim:
        raise fault(
            folder,
            f": text_encoder/config.json and text_encoder_2/config.json: projection_dim {pooled[0]} and {pooled[1]} add"
            f" up to {sum(pooled)}, pooled_projection_dim of transformer/config.json is"
            f" {transformer.pooled_projection_dim}",
        )
    if t5 is not None:
        width = transformer.joint_attention_dim
        check_width(component_folder(folder, T5), "d_model", t5.d_model, "joint_attention_dim", width)


def _limits(folder: Path, transformer: SD3Config, multiple: int) -> tuple[Sizes, Preset]:
    """Pictures that the table of positions covers, and the preset that holds. Raises CheckpointError."""
    longest, native = transformer.pos_embed_max_size * multiple, transformer.sample_size * multiple // LATENTS_PER_ROW
    largest = min(Preset().max_size, longest)
    side = max(multiple, min(native, largest) // multiple * multiple)
    default = msgspec.structs.replace(
        transformer.preset,
        min_size=min(Preset().min_size, side),
        max_size=largest,
        default_width=side,
        default_height=side,
    )
    preset = read_preset(folder, default)
    if preset.max_size > longest:
        raise fault(
            folder / PRESET_FILE,
            f": max_size {preset.max_size} is beyond the {longest} pixels of pos_embed_max_size"
            f" {transformer.pos_embed_max_size}",
        )
    default_size = preset.default_width, preset.default_height
    sizes = Sizes(min=preset.min_size, max=preset.max_size, multiple=multiple, default=default_size)
    return check_sizes(folder, sizes), preset


def _num_clip_rows(folder: Path, clips: Sequence[ClipConfig]) -> int:
    """As long as both CLIPs' tokenizers make all prompts; where there are none (`dummy`), all that CLIP takes."""
    lengths = []
    for name, clip in zip(CLIPS, clips, strict=True):
        tokenizer, most = component_folder(folder, TOKENIZER_OF[name]), clip.max_position_embeddings
        lengths.append(max_prompt_tokens(tokenizer, most) if has_vocabulary(tokenizer) else most)
    if lengths[0] != lengths[1]:
        raise fault(
            folder, f": tokenizer and tokenizer_2 make prompts of {lengths[0]} and {lengths[1]} tokens; both must agree"
        )
    return lengths[0]


FAMILY: Family = Sd3()
