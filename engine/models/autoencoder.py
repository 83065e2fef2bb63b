"""Packed latents -> picture, as FluxPipeline decodes, and on a CPU with the same bits for any number of threads.

Owns the VAE decoder: a library module over given weights, on their device and in their dtype. Worker-only: importing it
takes seconds.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor, nn

from tetrion.engine.model_spec import CheckpointError, ModelSpec
from tetrion.engine.models.dummy import module_shapes
from tetrion.engine.models.loading import build_module
from tetrion.engine.sampling.flow_match import unpack_latents
from tetrion.kernels.reference import silu

UNUSED_PREFIXES = ("encoder.", "quant_conv.")
"""Parts of the VAE that only turn pictures into latents."""


class Autoencoder:
    """The decoding half of an AutoencoderKL."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
        """folder: the checkpoint's `vae/`. Raises CheckpointError for missing tensors or an unsupported class."""
        config = _read_config(folder)
        if 4 * config["latent_channels"] != spec.in_channels:
            raise CheckpointError(
                f"model: {str(folder)!r} has {config['latent_channels']} latent channels, four times as many must equal"
                f" the transformer's in_channels {spec.in_channels}"
            )
        self.whole_pixels = math.inf
        """Larger pictures are decoded in overlapping tiles, which takes less memory and more time."""
        self._size_multiple = spec.sizes.multiple
        self._scaling_factor = float(config.get("scaling_factor") or 1.0)
        self._shift_factor = float(config.get("shift_factor") or 0.0)
        self._vae = build_module(_builder(config), tensors, str(folder), unused=UNUSED_PREFIXES)
        weight = self._vae.decoder.conv_in.weight
        self._device, self._dtype = weight.device, weight.dtype
        if self._device.type == "cpu":
            _make_thread_exact(self._vae)

    @property
    def decoder(self) -> Decoder:
        """The library's module, for those who make it faster where it runs."""
        return self._vae.decoder

    @torch.no_grad()
    def decode(self, latents: Tensor, width: int, height: int) -> Tensor:
        """latents: packed [tokens, in_channels], fp32, of a `width` × `height` picture -> uint8 RGB [height, width, 3].

        On the weights' device, without waiting for it.
        """
        rows, columns = height // self._size_multiple, width // self._size_multiple
        if latents.shape[0] != rows * columns:
            raise ValueError(f"latents: {width}x{height} pixels need {rows * columns} tokens, got {latents.shape[0]}")
        latents_1CHW = unpack_latents(latents, rows, columns).unsqueeze(0)
        latents_1CHW = latents_1CHW / self._scaling_factor + self._shift_factor
        decode = self._vae.tiled_decode if width * height > self.whole_pixels else self._vae.decode
        picture_CHW = decode(latents_1CHW.to(self._dtype), return_dict=False)[0][0]
        picture_HWC = (picture_CHW.float() * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0)
        return (picture_HWC * 255).round().to(torch.uint8).contiguous()


def vae_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that `vae/config.json` means."""
    return module_shapes(_builder(_read_config(folder)))


def _read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = {"latent_channels": 4} | json.loads((folder / "config.json").read_bytes())
    if config.get("_class_name") != "AutoencoderKL":
        raise CheckpointError(f"model: vae {config.get('_class_name')!r} is not supported (supported: AutoencoderKL)")
    return config


def _builder(config: dict[str, Any]) -> Callable[[], AutoencoderKL]:
    return functools.partial(AutoencoderKL.from_config, config)


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
