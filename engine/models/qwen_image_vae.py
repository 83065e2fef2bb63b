"""AutoencoderKLQwenImage as the codec of pictures: a video's autoencoder over a single frame.

Its causal convolutions over frames become ones over pixels (see `families/qwen_image_vae.py`): of zeros before the
first frame nothing comes. A third of the weights and of the work; sums are the same but for their order.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    AutoencoderKLQwenImage,
    QwenImageCausalConv3d,
    QwenImageResample,
    QwenImageRMS_norm,
)
from torch import Tensor, nn

from tetrion.engine.families.qwen_image_vae import QwenImageVaeConfig, frame_plan
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.autoencoders import Autoencoder, unused_parts
from tetrion.engine.models.dummy import module_shapes
from tetrion.engine.models.loading import Component, TensorFiles
from tetrion.engine.sampling.flow_match import unpack_latents

LEAST = 1e-24
"""A pixel's mean square is at least this; the library bounds the norm by its root."""


class QwenImageCodec(Autoencoder):
    """Latents are scaled channel by channel, then packed 2 × 2."""

    KIND = AutoencoderKLQwenImage
    CONFIG = QwenImageVaeConfig
    _mean: Tensor
    _deviation: Tensor

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
        super().__init__(folder, tensors, spec)
        self._vae.decoder, self._vae.encoder = OneFrame(self._vae.decoder), OneFrame(self._vae.encoder)
        self._mean, self._deviation = self._mean.to(self._device), self._deviation.to(self._device)

    @classmethod
    def shapes(cls, folder: Path) -> dict[str, tuple[int, ...]]:
        return module_shapes(super()._builder(folder))

    @classmethod
    def component(cls, files: TensorFiles, spec: ModelSpec) -> Component:
        """What is loaded of the checkpoint's `vae/`."""
        shapes = {name: files.shape(name) for name in files.names}
        return Component(files, frame_plan(shapes, unused_parts(spec)))

    def fuse(self) -> None:
        fuse(self._vae.decoder)

    @classmethod
    def _builder(cls, folder: Path) -> Callable[[], Any]:
        build = super()._builder(folder)
        return lambda: _of_one_frame(build())

    def _read_scaling(self, config: QwenImageVaeConfig) -> None:
        self._mean, self._deviation = (
            torch.tensor(values).view(-1, 1, 1) for values in (config.latents_mean, config.latents_std)
        )

    def _decodable(self, latents: Tensor, rows: int, columns: int) -> Tensor:
        return unpack_latents(latents, rows, columns) * self._deviation + self._mean

    def _scaled(self, latents: Tensor) -> Tensor:
        return (latents - self._mean) / self._deviation

    @staticmethod
    def _batched(map_CHW: Tensor) -> Tensor:
        return map_CHW[None, :, None]

    @staticmethod
    def _single(maps: Tensor) -> Tensor:
        return maps[0, :, 0]


class FrameConv(nn.Conv2d):
    """What a convolution that is causal in time does to a single frame, [1, C, 1, H, W]."""

    @classmethod
    def of(cls, conv: QwenImageCausalConv3d) -> "FrameConv":
        _, height, width = conv.kernel_size
        _, down, right = conv.stride
        left, _, top, *_ = conv._padding
        return cls(conv.in_channels, conv.out_channels, (height, width), (down, right), (int(top), int(left)))

    def forward(self, x_1C1HW: Tensor) -> Tensor:
        return super().forward(x_1C1HW.squeeze(2)).unsqueeze(2)


class OneFrame(nn.Module):
    """Half of an autoencoder, which keeps nothing for frames to come."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x_1C1HW: Tensor, feat_cache: object = None, feat_idx: object = None) -> Tensor:
        result: Tensor = self.part(x_1C1HW)
        return result


class PixelNorm(nn.Module):
    """RMSNorm over a pixel's channels with the SiLU behind it, if there is one; fastest with channels last."""

    def __init__(self, norm: QwenImageRMS_norm, has_silu: bool) -> None:
        super().__init__()
        self.weight, self._has_silu = norm.gamma.flatten(), has_silu

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.movedim(1, -1), self.weight.shape, self.weight, LEAST)
        return (F.silu(normed, inplace=True) if self._has_silu else normed).movedim(-1, 1)


def fuse(decoder: nn.Module) -> None:
    """Make it fast on a GPU, in place: channels last, norms with the SiLU behind them."""
    for weight in (parameter for parameter in decoder.parameters() if parameter.ndim == 4):
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    for module in list(decoder.modules()):
        has_silu = isinstance(getattr(module, "nonlinearity", None), nn.SiLU)
        for name, norm in list(module.named_children()):
            if isinstance(norm, QwenImageRMS_norm):
                setattr(module, name, PixelNorm(norm, has_silu))
        if has_silu:
            module.nonlinearity = nn.Identity()


def _of_one_frame(module: Any) -> Any:
    """In place."""
    for name, child in list(module.named_children()):
        if isinstance(child, QwenImageCausalConv3d):
            setattr(module, name, FrameConv.of(child))
        else:
            _of_one_frame(child)
    if isinstance(module, QwenImageResample):
        module._modules.pop("time_conv", None)
    return module
