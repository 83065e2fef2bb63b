"""Components that families have in common, as their configs and the headers of their weights describe them.

What is checked here is what would otherwise show only in a worker, or in a wrong picture.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from tetrion.engine.errors import shown
from tetrion.engine.families.files import fault, read_object
from tetrion.engine.families.plan import Shape

CONFIG = "config.json"
QUANTIZATION = ("quantization_config", "compression_config")
CLIPS = ("CLIPTextModel", "CLIPTextModelWithProjection")
T5S = ("T5EncoderModel", "T5ForConditionalGeneration", "T5Model", "T5WithLMHeadModel")
T5_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")
"""One table; checkpoints have either name, or both."""

Count = Annotated[int, Meta(ge=1, le=1000)]
Index = Annotated[int, Meta(ge=0, lt=1000)]
Size = Annotated[int, Meta(ge=1, le=1_000_000)]
_Scale = Annotated[float, Meta(gt=0, le=1e6)]
_Shift = Annotated[float, Meta(ge=-1e6, le=1e6)]
_T = TypeVar("_T")


class VaeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Of an AutoencoderKL. Defaults are the library's; without a shift there is none."""

    block_out_channels: Annotated[tuple[Size, ...], Meta(min_length=1, max_length=10)]
    latent_channels: Size = 4
    out_channels: Literal[3] = 3
    layers_per_block: Count = 1
    norm_num_groups: Size = 32
    scaling_factor: _Scale = 0.18215
    shift_factor: _Shift | None = None
    use_post_quant_conv: bool = True

    @property
    def scale_factor(self) -> int:
        """Pixels a latent pixel's side."""
        return 2 ** (len(self.block_out_channels) - 1)


class ClipConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Of CLIP's text model. Defaults are the library's."""

    hidden_size: Size = 512
    num_hidden_layers: Count = 12
    num_attention_heads: Size = 8
    intermediate_size: Size = 2048
    projection_dim: Size = 512
    vocab_size: Annotated[int, Meta(ge=1, le=10_000_000)] = 49408
    max_position_embeddings: Annotated[int, Meta(ge=1, le=4096)] = 77


class T5Config(msgspec.Struct, frozen=True, kw_only=True):
    """Of T5's encoder. Defaults are the library's."""

    d_model: Size = 512
    d_kv: Size = 64
    d_ff: Size = 2048
    num_layers: Count = 6
    num_heads: Size = 8
    vocab_size: Annotated[int, Meta(ge=1, le=10_000_000)] = 32128


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


def convert(path: Path, config: Mapping[str, Any], kind: type[_T]) -> _T:
    """What of a JSON object counts. Raises CheckpointError naming the field."""
    try:
        return msgspec.convert(config, kind)
    except (msgspec.ValidationError, OverflowError) as error:
        raise fault(path, f": {error}") from None


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


def check_clip(folder: Path, config: ClipConfig, shapes: Mapping[str, Shape], is_projected: bool = False) -> None:
    """Raises CheckpointError unless the encoder's tensors are as its config says, as far as a few of them tell."""
    shapes = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    embeddings = {
        "embeddings.token_embedding.weight": (config.vocab_size, config.hidden_size),
        "embeddings.position_embedding.weight": (config.max_position_embeddings, config.hidden_size),
    }
    if is_projected:
        embeddings["text_projection.weight"] = (config.projection_dim, config.hidden_size)
    _check_shapes(folder, embeddings, shapes)
    _check_layers(folder, "encoder.layers.", config.num_hidden_layers, "num_hidden_layers", shapes)


def check_t5(folder: Path, config: T5Config, shapes: Mapping[str, Shape]) -> None:
    """See `check_clip`."""
    table = next((name for name in T5_EMBEDDINGS if name in shapes), T5_EMBEDDINGS[0])
    _check_shapes(folder, {table: (config.vocab_size, config.d_model)}, shapes)
    _check_layers(folder, "encoder.block.", config.num_layers, "num_layers", shapes)


def check_vae(folder: Path, config: VaeConfig, shapes: Mapping[str, Shape]) -> None:
    """See `check_clip`; of the decoder."""
    first, last, latent = config.block_out_channels[0], config.block_out_channels[-1], config.latent_channels
    expected: dict[str, Shape] = {
        "decoder.conv_in.weight": (last, latent, 3, 3),
        "decoder.conv_out.weight": (config.out_channels, first, 3, 3),
    }
    if config.use_post_quant_conv:
        expected["post_quant_conv.weight"] = (latent, latent, 1, 1)
    _check_shapes(folder, expected, shapes)
    _check_layers(folder, "decoder.up_blocks.", len(config.block_out_channels), "block_out_channels", shapes)


def _check_shapes(folder: Path, expected: Mapping[str, Shape], shapes: Mapping[str, Shape]) -> None:
    for name, shape in expected.items():
        if name not in shapes:
            raise fault(folder, f" has no tensor {name}, which config.json means")
        if shapes[name] != shape:
            raise fault(folder, f": {name} has shape {list(shapes[name])}, config.json means {list(shape)}")


def _check_layers(folder: Path, prefix: str, count: int, field: str, shapes: Mapping[str, Shape]) -> None:
    found = {name.removeprefix(prefix).partition(".")[0] for name in shapes if name.startswith(prefix)}
    if found != {str(i) for i in range(count)}:
        raise fault(folder, f" has {len(found)} of the blocks {prefix}*, {field} of config.json means {count}")


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
