"""AutoencoderKLQwenImage21, by its config and without torch: pictures, perhaps with opacity, of 16 × 16 pixels a latent
pixel."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from tetrion.engine.families.components import Count, Size
from tetrion.engine.families.library_shapes import BESIDE_DECODER, check_shapes
from tetrion.engine.families.plan import Shape

VAE_CLASS = "AutoencoderKLQwenImage21"
MEAN = (
    0.5126, 0.7721, -0.0631, 1.3506, -0.7855, -2.1025, -0.3458, 1.3722, 1.8873, -1.7177, -0.6510, 0.2732, 0.7562,
    -0.6163, -1.0277, 3.8363, 2.0210, 0.0472, 0.9320, 2.0087, 2.4954, -0.1391, -1.4249, 1.8464, -0.5236, 1.2826,
    3.7046, -1.3035, 2.7286, -1.4518, -1.9036, -1.9955, -0.0342, -1.0265, -0.7636, 3.0555, 0.0746, -3.0751, -0.1076,
    1.7376, -1.0914, -1.9435, -0.2784, -1.3680, 0.4809, -0.4433, 0.3764, 0.5729, -2.0595, 1.0960, -1.3260, -2.0211,
    -5.0179, 0.5275, 4.0162, 1.8505, 0.3026, 1.9373, 1.4937, 0.2632, 0.5547, -1.7121, -0.1562, 0.0304,
)  # fmt: skip
DEVIATION = (
    3.2001, 3.2936, 3.4321, 3.0091, 3.1061, 4.0379, 4.0705, 3.7910, 3.0785, 3.6500, 3.9308, 3.0904, 2.8778, 3.7675,
    3.7320, 5.0756, 3.2864, 4.0397, 3.1317, 4.0443, 2.9249, 3.9454, 3.0988, 4.2489, 3.4896, 3.8513, 3.9323, 3.4719,
    3.7498, 4.2830, 3.5694, 4.2467, 3.9037, 3.2947, 5.0770, 3.5075, 3.2700, 3.4767, 2.8063, 5.1125, 3.5327, 4.7833,
    3.1286, 4.1819, 3.8527, 3.8312, 3.5605, 4.3875, 3.9624, 4.0168, 3.5643, 4.0550, 5.5614, 4.2963, 4.4080, 3.4959,
    3.8747, 3.7608, 3.5735, 3.1490, 3.7662, 3.6746, 3.4563, 3.8161,
)  # fmt: skip
SCALE_FACTOR = 16
"""Pixels a latent pixel's side; the pipeline knows no other."""
_Factors = Annotated[tuple[Count, ...], Meta(min_length=5, max_length=5)]
_Mean = Annotated[float, Meta(ge=-1e6, le=1e6)]
_Deviation = Annotated[float, Meta(gt=0, le=1e6)]
_Channels = Literal[3, 4]
Named = Iterator[tuple[str, Shape]]


class QwenImage21VaeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Defaults are the library's. `dim_mult`: channels of each block, as multiples of `base_dim`, in the decoder of
    `decoder_base_dim`. A fourth channel of pictures is their opacity."""

    base_dim: Size = 96
    decoder_base_dim: Size | None = 144
    z_dim: Size = 64
    dim_mult: _Factors = (1, 2, 4, 8, 8)
    num_res_blocks: Count = 2
    attn_scales: Annotated[tuple[float, ...], Meta(max_length=0)] = ()
    temperal_downsample: Annotated[tuple[bool, ...], Meta(min_length=4, max_length=4)] = (False, True, True, True)
    latents_mean: Annotated[tuple[_Mean, ...], Meta(max_length=1000)] = MEAN
    latents_std: Annotated[tuple[_Deviation, ...], Meta(max_length=1000)] = DEVIATION
    is_residual: Literal[True] = True
    in_channels: _Channels = 4
    out_channels: _Channels = 4
    patch_size: None = None
    scale_factor_spatial: Literal[16] | None = 16

    @property
    def latent_channels(self) -> int:
        return self.z_dim

    def __post_init__(self) -> None:
        if len(self.latents_mean) != self.z_dim or len(self.latents_std) != self.z_dim:
            raise ValueError(
                f"latents_mean {len(self.latents_mean)} and latents_std {len(self.latents_std)} must be as many as"
                f" z_dim {self.z_dim}"
            )


def decoder_shapes(config: QwenImage21VaeConfig) -> dict[str, Shape]:
    """Of its decoding half."""
    return dict(_decoder(config))


def encoder_shapes(config: QwenImage21VaeConfig) -> dict[str, Shape]:
    """Of its encoding half."""
    return dict(_encoder(config))


def check_autoencoder(folder: Path, config: QwenImage21VaeConfig, shapes: Mapping[str, Shape]) -> None:
    """Raises CheckpointError unless the tensors are as its config says. The encoding half may be missing as a whole."""
    is_whole = any(name.startswith(BESIDE_DECODER) for name in shapes)
    meant = decoder_shapes(config) | (encoder_shapes(config) if is_whole else {})
    check_shapes(folder, meant, shapes, () if is_whole else BESIDE_DECODER)


def _decoder(config: QwenImage21VaeConfig) -> Named:
    base = config.decoder_base_dim or config.base_dim
    channels = [base * factor for factor in config.dim_mult[::-1]]
    yield from _conv("post_quant_conv", config.z_dim, config.z_dim, 1)
    yield from _conv("decoder.conv_in", channels[0], config.z_dim, 3)
    yield from _middle("decoder.mid_block", channels[0])
    doubles_time = config.temperal_downsample[::-1]
    for i, (num_in, num_out) in enumerate(zip((channels[0], *channels), channels, strict=False)):
        block = f"decoder.up_blocks.{i}"
        for j in range(config.num_res_blocks + 1):
            yield from _resnet(f"{block}.resnets.{j}", num_out, num_out if j else num_in)
        if i < len(channels) - 1:
            yield from _conv(f"{block}.upsampler.resample.1", num_out, num_out, 3)
            if doubles_time[i]:
                yield from _conv(f"{block}.upsampler.time_conv", 2 * num_out, num_out, 1)
    yield "decoder.norm_out.gamma", (channels[-1], 1, 1, 1)
    yield from _conv("decoder.conv_out", config.out_channels, channels[-1], 3)


def _encoder(config: QwenImage21VaeConfig) -> Named:
    channels = [config.base_dim * factor for factor in config.dim_mult]
    yield from _conv("encoder.conv_in", config.base_dim, config.in_channels, 3)
    for i, (num_in, num_out) in enumerate(zip((config.base_dim, *channels), channels, strict=False)):
        block = f"encoder.down_blocks.{i}"
        for j in range(config.num_res_blocks):
            yield from _resnet(f"{block}.resnets.{j}", num_out, num_out if j else num_in)
        if i < len(channels) - 1:
            yield from _conv(f"{block}.downsampler.resample.1", num_out, num_out, 3)
            if config.temperal_downsample[i]:
                yield from _conv(f"{block}.downsampler.time_conv", num_out, num_out, 1)
    yield from _middle("encoder.mid_block", channels[-1])
    yield "encoder.norm_out.gamma", (channels[-1], 1, 1, 1)
    yield from _conv("encoder.conv_out", 2 * config.z_dim, channels[-1], 3)
    yield from _conv("quant_conv", 2 * config.z_dim, 2 * config.z_dim, 1)


def _middle(name: str, width: int) -> Named:
    for i in range(2):
        yield from _resnet(f"{name}.resnets.{i}", width, width)
    yield f"{name}.attentions.0.norm.gamma", (width, 1, 1)
    yield from _conv(f"{name}.attentions.0.to_qkv", 3 * width, width, 1)
    yield from _conv(f"{name}.attentions.0.proj", width, width, 1)


def _resnet(name: str, num_out: int, num_in: int) -> Named:
    yield f"{name}.norm1.gamma", (num_in, 1, 1, 1)
    yield from _conv(f"{name}.conv1", num_out, num_in, 3)
    yield f"{name}.norm2.gamma", (num_out, 1, 1, 1)
    yield from _conv(f"{name}.conv2", num_out, num_out, 3)
    if num_in != num_out:
        yield from _conv(f"{name}.conv_shortcut", num_out, num_in, 1)


def _conv(name: str, num_out: int, num_in: int, side: int) -> Named:
    yield f"{name}.weight", (num_out, num_in, side, side)
    yield f"{name}.bias", (num_out,)
