"""Packed latents -> picture and back, as FluxPipeline and FluxImg2ImgPipeline have it, and on a CPU with the same bits
for any number of threads.

Owns the VAE: a library module over given weights, on their device and in their dtype, its encoder only for models that
take pictures. Worker-only: importing it takes seconds.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from tetrion.engine.families.components import CONFIG, VaeConfig, read_part
from tetrion.engine.families.files import read_object
from tetrion.engine.families.library_shapes import BESIDE_DECODER
from tetrion.engine.families.pictures import AROUND
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.dummy import module_shapes
from tetrion.engine.models.encoders import one_thread
from tetrion.engine.models.family import Begin, Beginning, Picture, ToDevice
from tetrion.engine.models.finite import is_finite
from tetrion.engine.models.loading import build_module
from tetrion.engine.params import Params
from tetrion.engine.sampling.flow_match import Schedule, pack_latents, unpack_latents
from tetrion.engine.shape import Size, StepShape
from tetrion.kernels.reference import silu


class Autoencoder:
    """The codec of families whose tokens are 2 × 2 latent pixels of an AutoencoderKL: noise, and both of its halves."""

    KIND: ClassVar[Any] = AutoencoderKL
    CONFIG: ClassVar[Any] = VaeConfig
    UNUSED: ClassVar[tuple[str, ...]] = ()
    """What names of tensors begin with that are never loaded."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
        """folder: the checkpoint's `vae/`. Raises CheckpointError for missing tensors or an unsupported class."""
        config = read_part(folder, self.CONFIG, self.KIND.__name__)
        self.whole_pixels = math.inf
        """See `models.family.LatentCodec`."""
        self._size_multiple, self._num_channels = spec.sizes.multiple, config.latent_channels
        self._read_scaling(config)
        unused = (*unused_parts(spec), *self.UNUSED)
        self._vae = build_module(self._builder(folder), tensors, folder, unused=unused)
        weight = next(self._vae.decoder.parameters())
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

    def _read_scaling(self, config: Any) -> None:
        self._scaling_factor, self._shift_factor = config.scaling_factor, config.shift_factor or 0.0

    def _decodable(self, latents: Tensor, rows: int, columns: int) -> Tensor:
        """Packed latents of rows × columns tokens as the decoder takes them: [channels, height, width]."""
        return unpack_latents(latents, rows, columns) / self._scaling_factor + self._shift_factor

    def fuse(self) -> None:
        from tetrion.engine.models.fused_decoder import fuse  # which needs Triton

        fuse(self._vae.decoder)

    def noise(self, seed: int, shape: StepShape) -> Tensor:
        """As `models.family.LatentCodec`: drawn as latent pixels [channels, height, width], then packed."""
        generator = torch.Generator("cpu").manual_seed(seed)
        size = (1, self._num_channels, *self._latent_size(shape.size))
        return pack_latents(torch.randn(size, generator=generator, dtype=torch.float32)[0])

    def noised(self, picture: Tensor, generator: torch.Generator, level: float, to_device: ToDevice) -> Tensor:
        """A picture with so large a share of noise, packed, fp32. As FluxImg2ImgPipeline and
        StableDiffusion3Img2ImgPipeline draw it: first the sample of what the picture may mean, then the noise."""
        normal, noise = (to_device(self._normal(picture, generator)) for _ in range(2))
        if level == 1.0:
            return pack_latents(noise)
        latents = self._scaled(self._sampled(self._distribution(picture), normal))
        return pack_latents(level * noise + (1.0 - level) * latents)

    def around_a_hole(self, picture: Tensor, mask: Tensor, generator: torch.Generator, to_device: ToDevice) -> Tensor:
        """What is left of a picture where its mask (uint8 [height, width, 1], 0 or 255) is 0, and the mask itself: one
        row a token, fp32. As FluxFillPipeline has it: pixels of the mask are channels of latent pixels."""
        normal = to_device(self._normal(picture, generator))
        hole_1HW = (mask > 0).float().permute(2, 0, 1)
        latents = self._scaled(self._sampled(self._distribution(picture, hole_1HW), normal))
        _, rows, columns = latents.shape
        side = mask.shape[0] // rows
        pixels = hole_1HW.view(rows, side, columns, side).permute(1, 3, 0, 2).reshape(side * side, rows, columns)
        return torch.cat([pack_latents(latents), pack_latents(pixels)], dim=1)

    def _normal(self, picture: Tensor, generator: torch.Generator) -> Tensor:
        """Normally distributed, of the picture's latents, on the host: [channels, h, w]."""
        height, width, _ = picture.shape
        size = (1, self._num_channels, *self._latent_size((width, height)))
        return torch.randn(size, generator=generator, dtype=torch.float32)[0]

    def reference(self, picture: Tensor) -> Tensor:
        """What a picture means by itself: packed, [rows, 4 · channels]."""
        mean, _ = self._distribution(picture).chunk(2)
        return pack_latents(self._scaled(mean))

    @torch.no_grad()
    def _distribution(self, picture: Tensor, hole_1HW: Tensor | None = None) -> Tensor:
        """uint8 RGB [height, width, 3] -> mean and logarithm of variance of its latents, fp32 [2 · channels, h, w]. It
        is grey where `hole_1HW` is 1."""
        height, width, _ = picture.shape
        picture_CHW = picture.permute(2, 0, 1).float() / 255 * 2 - 1
        if hole_1HW is not None:
            picture_CHW = picture_CHW * (1 - hole_1HW)
        self._vae.use_tiling = height * width > self.whole_pixels
        try:
            distribution = self._vae.encode(self._batched(picture_CHW.to(self._dtype))).latent_dist.parameters
        finally:
            self._vae.use_tiling = False
        return self._single(distribution).float()

    @staticmethod
    def _batched(map_CHW: Tensor) -> Tensor:
        """As the library's module takes it."""
        return map_CHW.unsqueeze(0)

    @staticmethod
    def _single(maps: Tensor) -> Tensor:
        """[C, H, W] of what the library's module gives."""
        return maps[0]

    @staticmethod
    def _sampled(distribution: Tensor, normal: Tensor) -> Tensor:
        mean, log_variance = distribution.chunk(2)
        with one_thread():  # the exponential's last elements depend on how the work is divided
            deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        return mean + deviation * normal

    def _scaled(self, latents: Tensor) -> Tensor:
        return (latents - self._shift_factor) * self._scaling_factor

    def _latent_size(self, size: Size) -> tuple[int, int]:
        """Rows and columns."""
        width, height = size
        return 2 * (height // self._size_multiple), 2 * (width // self._size_multiple)

    @torch.no_grad()
    def decode(self, latents: Tensor, shape: StepShape) -> Picture:
        """As `models.family.LatentCodec`; without waiting for the device."""
        rows, columns = shape.height // self._size_multiple, shape.width // self._size_multiple
        latents_CHW = self._decodable(latents, rows, columns)
        is_whole = shape.width * shape.height <= self.whole_pixels
        decode = self._vae.decode if is_whole else self._vae.tiled_decode
        picture_CHW = self._single(decode(self._batched(latents_CHW.to(self._dtype)), return_dict=False)[0])
        picture_HWC = (picture_CHW.float() * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0)
        if picture_HWC.shape[2] == 4:  # on white
            picture_HWC = 1 - picture_HWC[..., 3:] * (1 - picture_HWC[..., :3])
        pixels = (picture_HWC * 255).round().to(torch.uint8).contiguous()
        return Picture(pixels, is_finite(latents) & is_finite(picture_CHW))


def begins_with_a_picture(codec: Autoencoder, schedule: Callable[[int, StepShape], Schedule]) -> Begin:
    """Of models whose results begin with a picture, if there is one, else with noise; where there is a mask, too, they
    have the field `AROUND`. `schedule`: see `Model`."""

    def begin(params: Params, pictures: Sequence[Tensor], to_device: ToDevice) -> Beginning:
        shape, skipped = params.shape, params.skipped_steps
        if not shape.pictures:
            return Beginning(codec.noise(params.seed, shape))
        level = float(schedule(params.num_steps + skipped, shape).levels[skipped])
        generator = torch.Generator("cpu").manual_seed(params.seed)
        state = codec.noised(pictures[0], generator, level, to_device)
        if not shape.has_mask:
            return Beginning(state)
        picture, mask = pictures
        return Beginning(state, {AROUND: codec.around_a_hole(picture, mask, generator, to_device)})

    return begin


def begins_with_noise(codec: Autoencoder) -> Begin:
    """Of models that take no pictures."""
    return lambda params, pictures, to_device: Beginning(codec.noise(params.seed, params.shape))


def unused_parts(spec: ModelSpec) -> tuple[str, ...]:
    """What names of the VAE's tensors begin with that are not loaded: those that only turn pictures into latents."""
    return () if "pictures" in spec.inputs else BESIDE_DECODER


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
