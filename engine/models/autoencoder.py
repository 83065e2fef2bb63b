"""Packed latents -> picture, as FluxPipeline decodes, and with the same bits for any number of threads.

Owns the VAE decoder (a library module over shared weights). Worker-only: importing it takes seconds.
"""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn

from tetrion.engine.model_spec import CheckpointError, ModelSpec
from tetrion.engine.models.loading import build_module
from tetrion.engine.sampling.flow_match import unpack_latents
from tetrion.kernels.reference import silu

UNUSED_PREFIXES = ("encoder.", "quant_conv.")
"""Parts of the VAE that only turn pictures into latents."""


class Autoencoder:
    """The decoding half of an AutoencoderKL."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
        """folder: the checkpoint's `vae/`. Raises CheckpointError for missing tensors or an unsupported class."""
        config = {"latent_channels": 4} | json.loads((folder / "config.json").read_bytes())
        if config.get("_class_name") != "AutoencoderKL":
            raise CheckpointError(
                f"model: vae {config.get('_class_name')!r} is not supported (supported: AutoencoderKL)"
            )
        if 4 * config["latent_channels"] != spec.in_channels:
            raise CheckpointError(
                f"model: {str(folder)!r} has {config['latent_channels']} latent channels, four times as many must equal"
                f" the transformer's in_channels {spec.in_channels}"
            )
        self._size_multiple = spec.size_multiple
        self._scaling_factor = float(config.get("scaling_factor") or 1.0)
        self._shift_factor = float(config.get("shift_factor") or 0.0)
        build: Callable[[], AutoencoderKL] = functools.partial(AutoencoderKL.from_config, config)
        self._vae = build_module(build, tensors, str(folder), unused=UNUSED_PREFIXES)
        _make_thread_exact(self._vae)

    @torch.no_grad()
    def decode(self, latents: Tensor, width: int, height: int) -> NDArray[np.uint8]:
        """latents: packed [tokens, in_channels] of a `width` × `height` picture -> RGB [height, width, 3]."""
        rows, columns = height // self._size_multiple, width // self._size_multiple
        if latents.shape[0] != rows * columns:
            raise ValueError(f"latents: {width}x{height} pixels need {rows * columns} tokens, got {latents.shape[0]}")
        latents_1CHW = unpack_latents(latents, rows, columns).unsqueeze(0)
        latents_1CHW = latents_1CHW / self._scaling_factor + self._shift_factor
        picture_CHW = self._vae.decode(latents_1CHW, return_dict=False)[0][0]
        picture_HWC = (picture_CHW * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
        return np.ascontiguousarray((picture_HWC * 255).round().astype(np.uint8))


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
