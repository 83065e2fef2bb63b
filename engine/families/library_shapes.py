"""Names and shapes of the tensors that text encoders and autoencoders are made of, by their configs, without torch.

What the libraries' modules would say, who take seconds to be imported; `tests/engine/families/` holds them together.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tetrion.engine.families.components import ClipConfig, LanguageConfig, T5Config, VaeConfig
from tetrion.engine.families.files import fault
from tetrion.engine.families.plan import Shape, check_names

CLIP_PREFIX = "text_model."
"""What names of CLIP's tensors begin with in some checkpoints."""
T5_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")
"""One table; checkpoints have either name, or both."""
LANGUAGE_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")
"""What names of a language model's tensors begin with, where it has a head or is part of one that sees, too."""
TABLE = "embed_tokens.weight"
BESIDE_CLIP = ("text_projection.", "vision_model.", "visual_projection.", "logit_scale")
BESIDE_T5 = ("decoder.", "lm_head.", *T5_EMBEDDINGS)
BESIDE_DECODER = ("encoder.", "quant_conv.")
BESIDE_LANGUAGE = (
    *("lm_head.", "norm.", "layers.", "language_model.lm_head."),
    *(f"{prefix}{part}." for prefix in ("", "model.") for part in ("vision_tower", "multi_modal_projector", "visual")),
)
"""Parts of whole models that are not used; of an autoencoder only where no picture is turned into latents."""
Named = Iterator[tuple[str, Shape]]


def clip_shapes(config: ClipConfig, is_projected: bool) -> dict[str, Shape]:
    """Of CLIP's text model, without the prefix `text_model.`."""
    return dict(_clip(config, is_projected))


def t5_shapes(config: T5Config, table: str) -> dict[str, Shape]:
    """Of T5's encoder. `table`: which of its two names the table of embeddings has."""
    return dict(_t5(config, table))


def language_shapes(config: LanguageConfig, num_layers: int, is_normed: bool = False) -> dict[str, Shape]:
    """Of the first layers of a language model of Qwen3's kind, without the prefix `model.`, and of the norm behind all
    layers."""
    return dict(_language(config, num_layers, is_normed))


def decoder_shapes(config: VaeConfig) -> dict[str, Shape]:
    """Of AutoencoderKL's decoding half."""
    return dict(_decoder(config))


def check_clip(folder: Path, config: ClipConfig, shapes: Mapping[str, Shape], is_projected: bool = False) -> None:
    """Raises CheckpointError unless the component's tensors are as its config says."""
    shapes = {name.removeprefix(CLIP_PREFIX): shape for name, shape in shapes.items()}
    check_shapes(folder, clip_shapes(config, is_projected), shapes, BESIDE_CLIP)


def check_t5(folder: Path, config: T5Config, shapes: Mapping[str, Shape]) -> None:
    """See `check_clip`."""
    table = next((name for name in T5_EMBEDDINGS if name in shapes), T5_EMBEDDINGS[0])
    check_shapes(folder, t5_shapes(config, table), shapes, BESIDE_T5)


def check_language(
    folder: Path, config: LanguageConfig, num_layers: int, shapes: Mapping[str, Shape], is_normed: bool = False
) -> None:
    """See `check_clip`; further layers are not looked at."""
    prefix = language_prefix(shapes)
    shapes = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    check_shapes(folder, language_shapes(config, num_layers, is_normed), shapes, BESIDE_LANGUAGE)


def language_prefix(names: Iterable[str]) -> str:
    """Of a checkpoint's tensors."""
    tables = {name for name in names if name.endswith(TABLE)}
    return next((prefix for prefix in LANGUAGE_PREFIXES if f"{prefix}{TABLE}" in tables), "")


def encoder_shapes(config: VaeConfig) -> dict[str, Shape]:
    """Of its encoding half."""
    return dict(_encoder(config))


def has_encoder(config: VaeConfig, shapes: Mapping[str, Shape]) -> bool:
    """Whether an autoencoder's weights have the half that turns pictures into latents, as its config means it."""
    return config.has_encoder and any(name.startswith(BESIDE_DECODER) for name in shapes)


def check_autoencoder(folder: Path, config: VaeConfig, shapes: Mapping[str, Shape]) -> None:
    """See `check_clip`. Its encoding half may be missing as a whole."""
    is_whole = has_encoder(config, shapes)
    meant = decoder_shapes(config) | (encoder_shapes(config) if is_whole else {})
    check_shapes(folder, meant, shapes, () if is_whole else BESIDE_DECODER)


def check_shapes(folder: Path, meant: Mapping[str, Shape], found: Mapping[str, Shape], beside: tuple[str, ...]) -> None:
    """Raises CheckpointError unless the component's tensors are those that its config means, but for names that begin
    with one of `beside`."""
    check_names(meant.keys(), found.keys(), folder, beside)
    for name, shape in meant.items():
        if found[name] != shape:
            raise fault(folder, f": {name} has shape {list(found[name])}, config.json means {list(shape)}")


def _clip(config: ClipConfig, is_projected: bool) -> Named:
    width, inner = config.hidden_size, config.intermediate_size
    yield "embeddings.token_embedding.weight", (config.vocab_size, width)
    yield "embeddings.position_embedding.weight", (config.max_position_embeddings, width)
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layers.{i}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{layer}.self_attn.{projection}", width, width)
        yield from _linear(f"{layer}.mlp.fc1", inner, width)
        yield from _linear(f"{layer}.mlp.fc2", width, inner)
        yield from _norm(f"{layer}.layer_norm1", width)
        yield from _norm(f"{layer}.layer_norm2", width)
    yield from _norm("final_layer_norm", width)
    if is_projected:
        yield "text_projection.weight", (config.projection_dim, width)


def _t5(config: T5Config, table: str) -> Named:
    width, inner, heads = config.d_model, config.d_kv * config.num_heads, "SelfAttention"
    yield table, (config.vocab_size, width)
    for i in range(config.num_layers):
        attention, mlp = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        for projection in "qkv":
            yield f"{attention}.{heads}.{projection}.weight", (inner, width)
        yield f"{attention}.{heads}.o.weight", (width, inner)
        if i == 0:
            yield f"{attention}.{heads}.relative_attention_bias.weight", (config.num_buckets, config.num_heads)
        for name in ("wi_0", "wi_1") if config.is_gated else ("wi",):
            yield f"{mlp}.DenseReluDense.{name}.weight", (config.d_ff, width)
        yield f"{mlp}.DenseReluDense.wo.weight", (width, config.d_ff)
        yield f"{attention}.layer_norm.weight", (width,)
        yield f"{mlp}.layer_norm.weight", (width,)
    yield "encoder.final_layer_norm.weight", (width,)


def _language(config: LanguageConfig, num_layers: int, is_normed: bool) -> Named:
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    yield TABLE, (config.vocab_size, width)
    for i in range(num_layers):
        layer = f"layers.{i}"
        for projection, num_out in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield f"{layer}.self_attn.{projection}.weight", (num_out, width)
            if config.has_biases:
                yield f"{layer}.self_attn.{projection}.bias", (num_out,)
        yield f"{layer}.self_attn.o_proj.weight", (width, queries)
        for norm in ("q_norm", "k_norm") if config.has_head_norms else ():
            yield f"{layer}.self_attn.{norm}.weight", (config.head_dim,)
        for projection in ("gate_proj", "up_proj"):
            yield f"{layer}.mlp.{projection}.weight", (inner, width)
        yield f"{layer}.mlp.down_proj.weight", (width, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{norm}.weight", (width,)
    if is_normed:
        yield "norm.weight", (width,)


def _decoder(config: VaeConfig) -> Named:
    channels, latent = config.decoder_channels[::-1], config.latent_channels
    for statistic in ("running_mean", "running_var") if config.num_scaled else ():
        yield f"bn.{statistic}", (config.num_scaled,)
    if config.use_post_quant_conv:
        yield from _conv("post_quant_conv", latent, latent, 1)
    yield from _conv("decoder.conv_in", channels[0], latent, 3)
    yield from _middle("decoder.mid_block", channels[0], config.mid_block_add_attention)
    for i, (num_in, num_out) in enumerate(zip((channels[0], *channels), channels, strict=False)):
        block = f"decoder.up_blocks.{i}"
        for j in range(config.layers_per_block + 1):
            yield from _resnet(f"{block}.resnets.{j}", num_out, num_out if j else num_in)
        if i < len(channels) - 1:
            yield from _conv(f"{block}.upsamplers.0.conv", num_out, num_out, 3)
    yield from _norm("decoder.conv_norm_out", channels[-1])
    yield from _conv("decoder.conv_out", config.out_channels, channels[-1], 3)


def _encoder(config: VaeConfig) -> Named:
    channels, latent = config.block_out_channels, config.latent_channels
    yield from _conv("encoder.conv_in", channels[0], config.in_channels, 3)
    for i, (num_in, num_out) in enumerate(zip((channels[0], *channels), channels, strict=False)):
        block = f"encoder.down_blocks.{i}"
        for j in range(config.layers_per_block):
            yield from _resnet(f"{block}.resnets.{j}", num_out, num_out if j else num_in)
        if i < len(channels) - 1:
            yield from _conv(f"{block}.downsamplers.0.conv", num_out, num_out, 3)
    yield from _middle("encoder.mid_block", channels[-1], config.mid_block_add_attention)
    yield from _norm("encoder.conv_norm_out", channels[-1])
    yield from _conv("encoder.conv_out", 2 * latent, channels[-1], 3)
    if config.use_quant_conv:
        yield from _conv("quant_conv", 2 * latent, 2 * latent, 1)


def _middle(name: str, width: int, has_attention: bool) -> Named:
    for i in range(2):
        yield from _resnet(f"{name}.resnets.{i}", width, width)
    if has_attention:
        yield from _norm(f"{name}.attentions.0.group_norm", width)
        for projection in ("to_q", "to_k", "to_v", "to_out.0"):
            yield from _linear(f"{name}.attentions.0.{projection}", width, width)


def _resnet(name: str, num_out: int, num_in: int) -> Named:
    yield from _norm(f"{name}.norm1", num_in)
    yield from _conv(f"{name}.conv1", num_out, num_in, 3)
    yield from _norm(f"{name}.norm2", num_out)
    yield from _conv(f"{name}.conv2", num_out, num_out, 3)
    if num_in != num_out:
        yield from _conv(f"{name}.conv_shortcut", num_out, num_in, 1)


def _linear(name: str, num_out: int, num_in: int) -> Named:
    yield f"{name}.weight", (num_out, num_in)
    yield f"{name}.bias", (num_out,)


def _conv(name: str, num_out: int, num_in: int, side: int) -> Named:
    yield f"{name}.weight", (num_out, num_in, side, side)
    yield f"{name}.bias", (num_out,)


def _norm(name: str, width: int) -> Named:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)
