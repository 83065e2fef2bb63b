"""Packed latents -> picture, as FluxPipeline decodes, and on a CPU with the same bits for any number of threads.

Owns the VAE decoder: a library module over given weights, on their device and in their dtype. Worker-only: importing it
takes seconds.
"""

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
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

    KIND: ClassVar[Any] = AutoencoderKL
    CONFIG: ClassVar[type[VaeConfig]] = VaeConfig
    UNUSED_PREFIXES: ClassVar[tuple[str, ...]] = ("encoder.", "quant_conv.")
    """Parts of the VAE that only turn pictures into latents."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
        """folder: the checkpoint's `vae/`. Raises CheckpointError for missing tensors or an unsupported class."""
        config = read_part(folder, self.CONFIG, self.KIND.__name__)
        self.whole_pixels = math.inf
        """Larger pictures are decoded in overlapping tiles, which takes less memory and more time."""
        self._size_multiple, self._num_channels = spec.sizes.multiple, config.latent_channels
        self._scaling_factor, self._shift_factor = config.scaling_factor, config.shift_factor or 0.0
        self._vae = build_module(self._builder(folder), tensors, folder, unused=self.UNUSED_PREFIXES)
        weight = self._vae.decoder.conv_in.weight
        self._device, self._dtype = weight.device, weight.dtype
        if self._device.type == "cpu":
            _make_thread_exact(self._vae)

    @classmethod
    def shapes(cls, folder: Path) -> dict[str, tuple[int, ...]]:
        """Of all tensors that the config means."""
        return module_shapes(cls._builder(folder))

    @classmethod
    def _builder(cls, folder: Path) -> Callable[[], Any]:
        return functools.partial(cls.KIND.from_config, read_object(folder / CONFIG))

    def _decodable(self, latents: Tensor, rows: int, columns: int) -> Tensor:
        """Packed latents of rows × columns tokens as the decoder takes them: [channels, height, width]."""
        return unpack_latents(latents, rows, columns) / self._scaling_factor + self._shift_factor

    def fuse(self) -> None:
        from tetrion.engine.models.fused_decoder import fuse  # which needs Triton

        fuse(self._vae.decoder)

    def noise(self, seed: int, shape: StepShape) -> Tensor:
        """As `models.family.LatentCodec`: drawn as latent pixels [channels, height, width], then packed."""
        rows, columns = shape.height // self._size_multiple, shape.width // self._size_multiple
        generator = torch.Generator("cpu").manual_seed(seed)
        size = (1, self._num_channels, 2 * rows, 2 * columns)
        return pack_latents(torch.randn(size, generator=generator, dtype=torch.float32)[0])

    @torch.no_grad()
    def decode(self, latents: Tensor, shape: StepShape) -> Picture:
        """As `models.family.LatentCodec`; without waiting for the device."""
        rows, columns = shape.height // self._size_multiple, shape.width // self._size_multiple
        latents_1CHW = self._decodable(latents, rows, columns).unsqueeze(0)
        is_whole = shape.width * shape.height <= self.whole_pixels
        decode = self._vae.decode if is_whole else self._vae.tiled_decode
        picture_CHW = decode(latents_1CHW.to(self._dtype), return_dict=False)[0][0]
        picture_HWC = (picture_CHW.float() * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0)
        pixels = (picture_HWC * 255).round().to(torch.uint8).contiguous()
        return Picture(pixels, is_finite(latents) & is_finite(picture_CHW))


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
