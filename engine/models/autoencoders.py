"""Packed latents -> picture, as FluxPipeline decodes, and on a CPU with the same bits for any number of threads.

Owns the VAE decoder: a library module over given weights, on their device and in their dtype. Worker-only: importing it
takes seconds.
"""

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from tetrion.engine.families.components import CONFIG, VaeConfig, read_part
from tetrion.engine.families.files import read_object
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.dummy import module_shapes
from tetrion.engine.models.family import Picture
from tetrion.engine.models.finite import is_finite
from tetrion.engine.models.loading import build_module
from tetrion.engine.sampling.flow_match import pack_latents, unpack_latents
from tetrion.engine.shape import StepShape
from tetrion.kernels.reference import silu


class Autoencoder:
    """The codec of families whose tokens are 2 × 2 latent pixels of an AutoencoderKL: noise, and its decoding half."""

    UNUSED_PREFIXES = ("encoder.", "quant_conv.")
    """Parts of the VAE that only turn pictures into latents."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
        """folder: the checkpoint's `vae/`. Raises CheckpointError for missing tensors or an unsupported class."""
        config = _read_config(folder)
        self.whole_pixels = math.inf
        """Larger pictures are decoded in overlapping tiles, which takes less memory and more time."""
        self._size_multiple, self._num_channels = spec.sizes.multiple, config.latent_channels
        self._scaling_factor, self._shift_factor = config.scaling_factor, config.shift_factor or 0.0
        self._vae = build_module(_builder(folder), tensors, folder, unused=self.UNUSED_PREFIXES)
        weight = self._vae.decoder.conv_in.weight
        self._device, self._dtype = weight.device, weight.dtype
        if self._device.type == "cpu":
            _make_thread_exact(self._vae)

    @staticmethod
    def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
        """Of all tensors that the config means."""
        return module_shapes(_builder(folder))

    def fuse(self) -> None:
        from tetrion.engine.models.fused_decoder import fuse  # which needs Triton

        fuse(self._vae.decoder)

    def noise(self, seed: int, shape: StepShape) -> Tensor:
        """As `models.family.LatentCodec`: drawn as latent pixels [channels, height, width], then packed. Rows that cover
        nothing are zeros."""
        rows, columns = shape.height // self._size_multiple, shape.width // self._size_multiple
        generator = torch.Generator("cpu").manual_seed(seed)
        size = (1, self._num_channels, 2 * rows, 2 * columns)
        packed = pack_latents(torch.randn(size, generator=generator, dtype=torch.float32)[0])
        return F.pad(packed, (0, 0, 0, shape.image - len(packed)))

    @torch.no_grad()
    def decode(self, latents: Tensor, shape: StepShape) -> Picture:
        """As `models.family.LatentCodec`; without waiting for the device."""
        rows, columns = shape.height // self._size_multiple, shape.width // self._size_multiple
        latents = latents[: rows * columns]
        latents_1CHW = unpack_latents(latents, rows, columns).unsqueeze(0)
        latents_1CHW = latents_1CHW / self._scaling_factor + self._shift_factor
        is_whole = shape.width * shape.height <= self.whole_pixels
        decode = self._vae.decode if is_whole else self._vae.tiled_decode
        picture_CHW = decode(latents_1CHW.to(self._dtype), return_dict=False)[0][0]
        picture_HWC = (picture_CHW.float() * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0)
        pixels = (picture_HWC * 255).round().to(torch.uint8).contiguous()
        return Picture(pixels, is_finite(latents) & is_finite(picture_CHW))


def _read_config(folder: Path) -> VaeConfig:
    return read_part(folder, VaeConfig, "AutoencoderKL")


def _builder(folder: Path) -> Callable[[], AutoencoderKL]:
    return functools.partial(AutoencoderKL.from_config, read_object(folder / CONFIG))


class PointwiseConv2d(nn.Module):
    """A 1 × 1 convolution as one GEMM over pixels. oneDNN's own splits its sums by the number of threads."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x_BCHW: Tensor) -> Tensor:
        weight = self.weight.flatten(1)
        y_BCP = torch.matmul(weight, x_BCHW.flatten(2))
        if self.bias is not None:
            y_BCP += self.bias.unsqueeze(1)
        return y_BCP.unflatten(2, x_BCHW.shape[2:])


class ExactSiLU(nn.Module):
    """SiLU without the scalar tail whose place depends on the number of threads (see kernels/reference.py)."""

    def forward(self, x: Tensor) -> Tensor:
        return silu(x)


def _make_thread_exact(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.SiLU):
            setattr(module, name, ExactSiLU())
        elif isinstance(child, nn.Conv2d) and child.kernel_size == child.stride == (1, 1) and child.groups == 1:
            setattr(module, name, PointwiseConv2d(child))
        else:
            _make_thread_exact(child)
