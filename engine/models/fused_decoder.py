"""A VAE decoder made fast on a GPU: channels last, each group norm in one operator with the SiLU behind it.

Owns which of a library decoder's parts are replaced by what; its convolutions, attention and weights stay. With
diffusers' own layout most of a decoder's time goes into norms, activations and changes of layout.
"""

import torch
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from tetrion.kernels.group_norm_silu import can_norm, group_norm_silu


class FusedNorm(nn.Module):
    """A group norm and the SiLU behind it, for one picture's map with channels last (others are copied first)."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x_1CHW: Tensor) -> Tensor:
        x_HWC = x_1CHW[0].permute(1, 2, 0).contiguous()
        norm = self.norm
        out_PC = group_norm_silu(x_HWC.flatten(0, 1), norm.weight, norm.bias, norm.num_groups, norm.eps)
        return out_PC.view_as(x_HWC).permute(2, 0, 1).unsqueeze(0)


def fuse(decoder: Decoder) -> None:
    """In place. A norm that the kernel can't do, or that no SiLU follows, is left as it is."""
    for weight in (parameter for parameter in decoder.parameters() if parameter.ndim == 4):
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)  # a convolution's output follows it
    for block in (module for module in decoder.modules() if isinstance(module, ResnetBlock2D)):
        _fuse(block, ("norm1", "norm2"), "nonlinearity")
    _fuse(decoder, ("conv_norm_out",), "conv_act")


def _fuse(module: nn.Module, norm_names: tuple[str, ...], activation_name: str) -> None:
    """All of the norms that share an activation, or none."""
    norms = [getattr(module, name) for name in norm_names]
    if isinstance(getattr(module, activation_name), nn.SiLU) and all(map(_can_be_fused, norms)):
        for name, norm in zip(norm_names, norms, strict=True):
            setattr(module, name, FusedNorm(norm))
        setattr(module, activation_name, nn.Identity())


def _can_be_fused(norm: nn.Module) -> bool:
    return isinstance(norm, nn.GroupNorm) and can_norm(norm.num_channels, norm.num_groups)
