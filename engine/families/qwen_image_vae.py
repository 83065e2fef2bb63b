"""AutoencoderKLQwenImage, by its config and without torch: a video's autoencoder of which one frame is taken.

Its convolutions are causal in time: of a single frame they see the last of their three slices alone, so no other is
loaded, nor what halves and doubles the number of frames.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from tetrion.engine.families.components import Count, Size
from tetrion.engine.families.files import fault
from tetrion.engine.families.library_shapes import BESIDE_DECODER, check_shapes
from tetrion.engine.families.plan import Part, Plan, Shape

VAE_CLASS = "AutoencoderKLQwenImage"
OVER_TIME = ".time_conv."
"""In the names of tensors that no single frame needs."""
MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
DEVIATION = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
             3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip
Named = Iterator[tuple[str, Shape]]
_Factors = Annotated[tuple[Count, ...], Meta(min_length=2, max_length=10)]
_Mean = Annotated[float, Meta(ge=-1e6, le=1e6)]
_Deviation = Annotated[float, Meta(gt=0, le=1e6)]


class QwenImageVaeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Defaults are the library's. `dim_mult`: channels of each block, as multiples of `base_dim`; `latents_mean`,
    `latents_std`: of each latent channel."""

    base_dim: Size = 96
    z_dim: Size = 16
    dim_mult: _Factors = (1, 2, 4, 4)
    num_res_blocks: Count = 2
    attn_scales: Annotated[tuple[float, ...], Meta(max_length=0)] = ()
    temperal_downsample: Annotated[tuple[bool, ...], Meta(max_length=10)] = (False, True, True)
    input_channels: Literal[3] = 3
    latents_mean: Annotated[tuple[_Mean, ...], Meta(max_length=1000)] = MEAN
    latents_std: Annotated[tuple[_Deviation, ...], Meta(max_length=1000)] = DEVIATION

    @property
    def latent_channels(self) -> int:
        return self.z_dim

    @property
    def scale_factor(self) -> int:
        """Pixels a latent pixel's side."""
        return 2 ** len(self.temperal_downsample)

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the encoder's blocks, in order."""
        return tuple(self.base_dim * factor for factor in self.dim_mult)

    def __post_init__(self) -> None:
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"temperal_downsample {len(self.temperal_downsample)} must be one less than dim_mult"
                f" {len(self.dim_mult)}"
            )
        if len(self.latents_mean) != self.z_dim or len(self.latents_std) != self.z_dim:
            raise ValueError(
                f"latents_mean {len(self.latents_mean)} and latents_std {len(self.latents_std)} must be as many as"
                f" z_dim {self.z_dim}"
            )
        ups = self.channels[::-1]
        if any(num_out % 2 or num_out // 2 < 1 for num_out in ups[:-1]):
            raise ValueError(f"base_dim {self.base_dim} times dim_mult {list(self.dim_mult)} must be even")


def decoder_shapes(config: QwenImageVaeConfig) -> dict[str, Shape]:
    """Of its decoding half, as a checkpoint has it."""
    return dict(_decoder(config))


def encoder_shapes(config: QwenImageVaeConfig) -> dict[str, Shape]:
    """Of its encoding half."""
    return dict(_encoder(config))


def has_encoder(shapes: Mapping[str, Shape]) -> bool:
    """Whether an autoencoder's weights have the half that turns pictures into latents."""
    return any(name.startswith(BESIDE_DECODER) for name in shapes)


def check_autoencoder(folder: Path, config: QwenImageVaeConfig, shapes: Mapping[str, Shape]) -> None:
    """Raises CheckpointError unless the tensors are as its config says. The encoding half may be missing as a whole."""
    is_whole = has_encoder(shapes)
    meant = decoder_shapes(config) | (encoder_shapes(config) if is_whole else {})
    check_shapes(folder, meant, shapes, () if is_whole else BESIDE_DECODER)


def frame_plan(shapes: Mapping[str, Shape], without: tuple[str, ...] = ()) -> Plan:
    """What one frame takes of tensors of these shapes, under their own names, but for names that begin with one of
    `without`."""
    return {
        name: Part((name,), is_last_frame=len(shape) == 5)
        for name, shape in shapes.items()
        if OVER_TIME not in name and not name.startswith(without)
    }


def frame_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Of what is loaded of them."""
    return {name: part.in_memory(shapes[name]) for name, part in frame_plan(shapes).items()}


def check_latents(folder: Path, vae: QwenImageVaeConfig, in_channels: int) -> None:
    """Raises CheckpointError unless the transformer's tokens, of 2 × 2 latent pixels, are what the VAE decodes."""
    if 4 * vae.z_dim != in_channels:
        raise fault(
            folder,
            f" has {vae.z_dim} latent channels, four times as many must equal the {in_channels} channels of the"
            f" transformer's tokens (vae/config.json: z_dim {vae.z_dim}, transformer/config.json: in_channels"
            f" {in_channels})",
        )


def _decoder(config: QwenImageVaeConfig) -> Named:
    channels, latent = config.channels[::-1], config.z_dim
    yield from _conv("post_quant_conv", latent, latent, 1, 1, 1)
    yield from _conv("decoder.conv_in", channels[0], latent, 3, 3, 3)
    yield from _middle("decoder.mid_block", channels[0])
    over_time = config.temperal_downsample[::-1]
    for i, num_out in enumerate(channels):
        block, num_in = f"decoder.up_blocks.{i}", channels[i - 1] // 2 if i else channels[0]
        for j in range(config.num_res_blocks + 1):
            yield from _resnet(f"{block}.resnets.{j}", num_out, num_out if j else num_in)
        if i < len(over_time):
            yield from _conv(f"{block}.upsamplers.0.resample.1", num_out // 2, num_out, 3, 3)
            if over_time[i]:
                yield from _conv(f"{block}.upsamplers.0.time_conv", 2 * num_out, num_out, 3, 1, 1)
    yield "decoder.norm_out.gamma", (channels[-1], 1, 1, 1)
    yield from _conv("decoder.conv_out", config.input_channels, channels[-1], 3, 3, 3)


def _encoder(config: QwenImageVaeConfig) -> Named:
    channels, latent, index = config.channels, config.z_dim, 0
    yield from _conv("encoder.conv_in", config.base_dim, config.input_channels, 3, 3, 3)
    for i, (num_in, num_out) in enumerate(zip((config.base_dim, *channels), channels, strict=False)):
        for j in range(config.num_res_blocks):
            yield from _resnet(f"encoder.down_blocks.{index}", num_out, num_out if j else num_in)
            index += 1
        if i < len(config.temperal_downsample):
            yield from _conv(f"encoder.down_blocks.{index}.resample.1", num_out, num_out, 3, 3)
            if config.temperal_downsample[i]:
                yield from _conv(f"encoder.down_blocks.{index}.time_conv", num_out, num_out, 3, 1, 1)
            index += 1
    yield from _middle("encoder.mid_block", channels[-1])
    yield "encoder.norm_out.gamma", (channels[-1], 1, 1, 1)
    yield from _conv("encoder.conv_out", 2 * latent, channels[-1], 3, 3, 3)
    yield from _conv("quant_conv", 2 * latent, 2 * latent, 1, 1, 1)


def _middle(name: str, width: int) -> Named:
    for i in range(2):
        yield from _resnet(f"{name}.resnets.{i}", width, width)
    yield f"{name}.attentions.0.norm.gamma", (width, 1, 1)
    yield from _conv(f"{name}.attentions.0.to_qkv", 3 * width, width, 1, 1)
    yield from _conv(f"{name}.attentions.0.proj", width, width, 1, 1)


def _resnet(name: str, num_out: int, num_in: int) -> Named:
    yield f"{name}.norm1.gamma", (num_in, 1, 1, 1)
    yield from _conv(f"{name}.conv1", num_out, num_in, 3, 3, 3)
    yield f"{name}.norm2.gamma", (num_out, 1, 1, 1)
    yield from _conv(f"{name}.conv2", num_out, num_out, 3, 3, 3)
    if num_in != num_out:
        yield from _conv(f"{name}.conv_shortcut", num_out, num_in, 1, 1, 1)


def _conv(name: str, num_out: int, num_in: int, *kernel: int) -> Named:
    yield f"{name}.weight", (num_out, num_in, *kernel)
    yield f"{name}.bias", (num_out,)
