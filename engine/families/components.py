"""Components that families have in common, as their configs and the headers of their weights describe them.

What is checked here is what would otherwise show only in a worker, or in a wrong picture.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from tetrion.engine.errors import shown
from tetrion.engine.families.files import fault, read_object

CONFIG = "config.json"
QUANTIZATION = ("quantization_config", "compression_config")
DOWN_BLOCK = "DownEncoderBlock2D"
CLIPS = ("CLIPTextModel", "CLIPTextModelWithProjection")
QWEN3S = ("Qwen3ForCausalLM", "Qwen3Model")
QWEN25_VLS = ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel")
QWEN3_VLS = ("Qwen3VLForConditionalGeneration", "Qwen3VLModel")
MISTRAL3S = ("Mistral3ForConditionalGeneration",)
T5S = ("T5EncoderModel", "T5ForConditionalGeneration", "T5Model", "T5WithLMHeadModel")

Count = Annotated[int, Meta(ge=1, le=1000)]
Index = Annotated[int, Meta(ge=0, lt=1000)]
Size = Annotated[int, Meta(ge=1, le=1_000_000)]
_Epsilon = Annotated[float, Meta(ge=0, le=1)]
_TokenId = int | None
_Scale = Annotated[float, Meta(gt=0, le=1e6)]
_Shift = Annotated[float, Meta(ge=-1e6, le=1e6)]
_T = TypeVar("_T")


class VaeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Of an AutoencoderKL. Defaults are the library's; without a shift there is none."""

    block_out_channels: Annotated[tuple[Size, ...], Meta(min_length=1, max_length=10)]
    latent_channels: Size = 4
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    layers_per_block: Count = 1
    norm_num_groups: Size = 32
    scaling_factor: _Scale = 0.18215
    shift_factor: _Shift | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    down_block_types: Annotated[tuple[str, ...], Meta(max_length=10)] = (DOWN_BLOCK,)
    up_block_types: Annotated[tuple[Literal["UpDecoderBlock2D"], ...], Meta(max_length=10)] = ("UpDecoderBlock2D",)

    @property
    def scale_factor(self) -> int:
        """Pixels a latent pixel's side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def has_encoder(self) -> bool:
        """Whether its encoding half is one that is known here."""
        return self.down_block_types == (DOWN_BLOCK,) * len(self.block_out_channels)

    @property
    def decoder_channels(self) -> tuple[int, ...]:
        """Of the decoder's blocks, the widest last."""
        return self.block_out_channels

    @property
    def num_scaled(self) -> int:
        """Channels of packed latents that are scaled one by one."""
        return 0

    def __post_init__(self) -> None:
        if len(self.up_block_types) != len(self.block_out_channels):
            raise ValueError(f"up_block_types {len(self.up_block_types)} must be as many as block_out_channels")
        if len(self.decoder_channels) != len(self.block_out_channels):
            raise ValueError(f"decoder_block_out_channels {len(self.decoder_channels)} must be as many, too")
        if any(channels % self.norm_num_groups for channels in (*self.block_out_channels, *self.decoder_channels)):
            raise ValueError(
                f"norm_num_groups {self.norm_num_groups} must divide block_out_channels {list(self.block_out_channels)}"
            )


class Flux2VaeConfig(VaeConfig, frozen=True, kw_only=True):
    """Of an AutoencoderKLFlux2, whose latents are packed 2 × 2 and then scaled channel by channel, by the statistics of
    a batch norm."""

    block_out_channels: Annotated[tuple[Size, ...], Meta(min_length=1, max_length=10)] = (128, 256, 512, 512)
    decoder_block_out_channels: Annotated[tuple[Size, ...], Meta(min_length=1, max_length=10)] | None = None
    latent_channels: Size = 32
    layers_per_block: Count = 2
    down_block_types: Annotated[tuple[str, ...], Meta(max_length=10)] = (DOWN_BLOCK,) * 4
    up_block_types: Annotated[tuple[Literal["UpDecoderBlock2D"], ...], Meta(max_length=10)] = ("UpDecoderBlock2D",) * 4
    batch_norm_eps: _Epsilon = 1e-4
    patch_size: Annotated[tuple[Literal[2], ...], Meta(min_length=2, max_length=2)] = (2, 2)

    @property
    def decoder_channels(self) -> tuple[int, ...]:
        return self.decoder_block_out_channels or self.block_out_channels

    @property
    def num_scaled(self) -> int:
        return 4 * self.latent_channels


class ClipConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Of CLIP's text model. Defaults are the library's."""

    hidden_size: Size = 512
    num_hidden_layers: Count = 12
    num_attention_heads: Size = 8
    intermediate_size: Size = 2048
    projection_dim: Size = 512
    vocab_size: Annotated[int, Meta(ge=1, le=10_000_000)] = 49408
    max_position_embeddings: Annotated[int, Meta(ge=1, le=4096)] = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: _Epsilon = 1e-5
    bos_token_id: _TokenId = None
    eos_token_id: _TokenId | list[int] = None
    pad_token_id: _TokenId = None

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must divide hidden_size {self.hidden_size}"
            )


class T5Config(msgspec.Struct, frozen=True, kw_only=True):
    """Of T5's encoder. Defaults are the library's."""

    d_model: Size = 512
    d_kv: Size = 64
    d_ff: Size = 2048
    num_layers: Count = 6
    num_heads: Size = 8
    vocab_size: Annotated[int, Meta(ge=1, le=10_000_000)] = 32128
    num_buckets: Count = msgspec.field(default=32, name="relative_attention_num_buckets")
    feed_forward_proj: str = "relu"
    layer_norm_epsilon: _Epsilon = 1e-6
    eos_token_id: _TokenId | list[int] = None
    pad_token_id: _TokenId = None

    @property
    def is_gated(self) -> bool:
        return self.feed_forward_proj.startswith("gated-")


class _Rope(msgspec.Struct, frozen=True, kw_only=True):
    rope_type: Literal["default"] = "default"


class LanguageConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Of a language model of Qwen3's kind. Defaults are the library's."""

    hidden_size: Size = 4096
    intermediate_size: Size = 22016
    num_hidden_layers: Count = 32
    num_attention_heads: Size = 32
    num_key_value_heads: Size = 32
    head_dim: Size = 128
    vocab_size: Annotated[int, Meta(ge=1, le=10_000_000)] = 151936
    max_position_embeddings: Size = 32768
    rms_norm_eps: _Epsilon = 1e-6
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    use_sliding_window: Literal[False] = False
    layer_types: Annotated[tuple[Literal["full_attention"], ...], Meta(max_length=1000)] | None = None
    rope_scaling: None = None
    rope_parameters: _Rope | None = None

    @property
    def has_head_norms(self) -> bool:
        """Whether q and k are normed by head."""
        return True

    @property
    def has_biases(self) -> bool:
        """Whether what q, k and v are made by has one."""
        return False

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} must divide num_attention_heads"
                f" {self.num_attention_heads}"
            )


class _SectionedRope(_Rope, frozen=True, kw_only=True):
    """Pairs of channels turn by one of three positions, those of a section by the same. Text has one position."""

    rope_type: Literal["default", "mrope"] = "default"  # type: ignore[assignment]
    mrope_section: Annotated[tuple[Size, ...], Meta(min_length=3, max_length=3)] = (16, 24, 24)


class Qwen25VlConfig(LanguageConfig, frozen=True, kw_only=True):
    """Of Qwen2.5-VL's language model. A head is as wide as `num_attention_heads` leave it."""

    hidden_size: Size = 8192
    intermediate_size: Size = 29568
    num_hidden_layers: Count = 80
    num_attention_heads: Size = 64
    num_key_value_heads: Size = 8
    head_dim: Size = 0
    vocab_size: Annotated[int, Meta(ge=1, le=10_000_000)] = 152064
    rms_norm_eps: _Epsilon = 1e-5
    rope_scaling: _SectionedRope | None = None  # type: ignore[assignment]
    rope_parameters: _SectionedRope | None = None

    @property
    def has_head_norms(self) -> bool:
        return False

    @property
    def has_biases(self) -> bool:
        return True

    @property
    def sections(self) -> tuple[int, ...]:
        """Pairs of channels that turn by each of three positions."""
        rope = self.rope_parameters or self.rope_scaling or _SectionedRope()
        return rope.mrope_section

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must divide hidden_size {self.hidden_size}"
            )
        if 2 * sum(self.sections) != self.hidden_size // self.num_attention_heads:
            raise ValueError(
                f"mrope_section {list(self.sections)} must add up to half of hidden_size / num_attention_heads ="
                f" {self.hidden_size // self.num_attention_heads}"
            )


class _InterleavedRope(_Rope, frozen=True, kw_only=True):
    """Pairs of channels turn by three positions in turn. A text's rows have all three equal, so that it makes no
    difference how they are interleaved."""

    mrope_interleaved: Literal[True] = True
    mrope_section: Annotated[tuple[Size, ...], Meta(min_length=3, max_length=3)] = (24, 20, 20)


class Qwen3VlConfig(LanguageConfig, frozen=True, kw_only=True):
    """Of Qwen3-VL's language model, which is of Qwen3's kind."""

    max_position_embeddings: Size = 128000
    rope_scaling: _InterleavedRope | None = None  # type: ignore[assignment]
    rope_parameters: _InterleavedRope | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        rope = self.rope_parameters or self.rope_scaling or _InterleavedRope()
        if 3 * max(rope.mrope_section[1:]) > self.head_dim // 2:
            raise ValueError(f"mrope_section {list(rope.mrope_section)} must fit into half of head_dim {self.head_dim}")


class MistralConfig(LanguageConfig, frozen=True, kw_only=True):
    """Of a language model of Mistral's kind, which norms neither q nor k."""

    head_dim: Size
    num_key_value_heads: Size = 8
    max_position_embeddings: Size = 131072
    sliding_window: Annotated[int, Meta(ge=4096)] | None = None

    @property
    def has_head_norms(self) -> bool:
        return False


class _Qwen3Vl(msgspec.Struct, frozen=True, kw_only=True):
    """Which also sees pictures."""

    text_config: dict[str, Any]


class _Mistral3(msgspec.Struct, frozen=True, kw_only=True):
    """Which also sees pictures, by parts that are not used."""

    text_config: dict[str, Any]


class _Qwen25Vl(msgspec.Struct, frozen=True, kw_only=True):
    text_config: dict[str, Any] | None = None


def read_part(folder: Path, kind: type[_T], class_name: str) -> _T:
    """A component's config of diffusers. Raises CheckpointError naming the file and the field; OSError."""
    config = _read_config(folder)
    if (found := config.get("_class_name")) != class_name:
        raise fault(
            folder / CONFIG, f": {folder.name} {shown(found)} is not supported (_class_name must be {class_name!r})"
        )
    return convert(folder / CONFIG, config, kind)


def read_encoder(folder: Path, kind: type[_T], model_type: str, architectures: tuple[str, ...]) -> _T:
    """A text encoder's config of transformers. Raises CheckpointError naming the file and the field; OSError."""
    config = _read_config(folder)
    if (found := config.get("model_type", model_type)) != model_type:
        raise fault(
            folder / CONFIG, f": {folder.name} {shown(found)} is not supported (model_type must be {model_type!r})"
        )
    named = config.get("architectures") or [architectures[0]]
    if not isinstance(named, list) or named[0] not in architectures:
        raise fault(
            folder / CONFIG,
            f": {folder.name} {shown(named)} is not supported (architectures must be {list(architectures[:1])})",
        )
    return convert(folder / CONFIG, config, kind)


def read_clip(folder: Path, is_projected: bool = False) -> ClipConfig:
    """CLIP's text model, with its projection or perhaps without. Raises CheckpointError; OSError."""
    return read_encoder(folder, ClipConfig, "clip_text_model", CLIPS[1:] if is_projected else CLIPS)


def read_t5(folder: Path) -> T5Config:
    """T5's encoder, which may be a whole T5's. Raises CheckpointError; OSError."""
    return read_encoder(folder, T5Config, "t5", T5S)


def read_qwen3(folder: Path, num_layers: int, max_tokens: int) -> LanguageConfig:
    """Qwen3, of which the first `num_layers` are run on up to `max_tokens`. Raises CheckpointError; OSError."""
    return _deep_enough(folder, read_encoder(folder, LanguageConfig, "qwen3", QWEN3S), num_layers, max_tokens)


def read_qwen3_vl(folder: Path, num_layers: int, max_tokens: int) -> LanguageConfig:
    """Qwen3-VL's language model, likewise."""
    text = read_encoder(folder, _Qwen3Vl, "qwen3_vl", QWEN3_VLS).text_config
    if (found := text.get("model_type", "qwen3_vl_text")) != "qwen3_vl_text":
        raise fault(
            folder / CONFIG, f": text_config {shown(found)} is not supported (model_type must be 'qwen3_vl_text')"
        )
    return _deep_enough(folder, convert(folder / CONFIG, text, Qwen3VlConfig), num_layers, max_tokens)


def read_mistral3(folder: Path, num_layers: int, max_tokens: int) -> LanguageConfig:
    """Mistral3's language model, likewise."""
    text = read_encoder(folder, _Mistral3, "mistral3", MISTRAL3S).text_config
    if (found := text.get("model_type", "mistral")) != "mistral":
        raise fault(folder / CONFIG, f": text_config {shown(found)} is not supported (model_type must be 'mistral')")
    return _deep_enough(folder, convert(folder / CONFIG, text, MistralConfig), num_layers, max_tokens)


def read_qwen25_vl(folder: Path, max_tokens: int) -> Qwen25VlConfig:
    """Qwen2.5-VL's language model, likewise, all of it. Its fields are the config's own, or in its `text_config`."""
    whole = read_encoder(folder, _Qwen25Vl, "qwen2_5_vl", QWEN25_VLS)
    text = _read_config(folder) if whole.text_config is None else whole.text_config
    config = convert(folder / CONFIG, text, Qwen25VlConfig)
    config = msgspec.structs.replace(config, head_dim=config.hidden_size // config.num_attention_heads)
    _deep_enough(folder, config, 1, max_tokens)
    return config


def _deep_enough(folder: Path, config: LanguageConfig, num_layers: int, max_tokens: int) -> LanguageConfig:
    for field, have, needed in (
        ("num_hidden_layers", config.num_hidden_layers, num_layers),
        ("max_position_embeddings", config.max_position_embeddings, max_tokens),
    ):
        if have < needed:
            raise fault(folder / CONFIG, f": {field} {have} must be at least {needed}")
    return config


def convert(path: Path, config: Mapping[str, Any], kind: type[_T]) -> _T:
    """What of a JSON object counts. Raises CheckpointError naming the field."""
    try:
        return msgspec.convert(config, kind)
    except (msgspec.ValidationError, OverflowError) as error:
        raise fault(path, f": {error}") from None


def check_axes(path: Path, axes: Sequence[int], head_dim: int) -> None:
    """Raises CheckpointError unless rotary tables of these axes cover a head; `path`: of the transformer's config."""
    if sum(axes) != head_dim or any(dim % 2 for dim in axes):
        raise fault(
            path,
            f": axes_dims_rope {shown(list(axes))} must be even numbers that add up to attention_head_dim {head_dim}",
        )


def check_width(folder: Path, field: str, width: int, expected_by: str, expected: int) -> None:
    """Raises CheckpointError unless a text encoder gives what the transformer takes. Of both the config's field."""
    if width != expected:
        raise fault(
            folder,
            f" gives vectors of {width}, the transformer takes {expected} ({folder.name}/config.json: {field} {width},"
            f" transformer/config.json: {expected_by} {expected})",
        )


def check_latents(folder: Path, vae: VaeConfig, in_channels: int, per_row: int) -> None:
    """Raises CheckpointError unless the transformer's tokens, of `per_row` latent pixels, are what the VAE decodes."""
    if vae.latent_channels * per_row != in_channels:
        raise fault(
            folder,
            f" has {vae.latent_channels} latent channels, {'four times' if per_row == 4 else 'just'} as many must equal"
            f" the {in_channels} channels of the transformer's tokens (vae/config.json: latent_channels"
            f" {vae.latent_channels}, transformer/config.json: in_channels {in_channels})",
        )


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_object(folder / CONFIG)
    refuse_quantization(folder / CONFIG, config)
    return config


def refuse_quantization(path: Path, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for the config of quantized weights."""
    for field in QUANTIZATION:
        if (given := config.get(field)) is not None:
            method = given.get("quant_method", given) if isinstance(given, dict) else given
            raise fault(path, f": {field}: quantized weights ({shown(method)}) are not supported")
