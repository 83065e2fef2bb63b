"""A toy transformer and the first state of a request, the same in every process and on every device."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tetrion.engine.parallel.exchange import Rope, Stream
from tetrion.engine.parallel.layout import SlabLayout

NUM_LAYERS = 2


class Toy:
    """What a model would have as weights, for a whole sequence; only elementwise, so that rows stay exact."""

    def __init__(self, num_text: int, num_image: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(100 * num_text + num_image)
        self.width = num_heads * head_dim
        self.bias = torch.randn(num_text + num_image, 3 * self.width, generator=generator).to(dtype)
        self.norms = (1 + 0.1 * torch.randn(4, head_dim, generator=generator)).to(dtype)
        angles = torch.randn(num_text + num_image, head_dim // 2, generator=generator)
        self.cos, self.sin = angles.cos(), angles.sin()

    def to(self, device: torch.device) -> "Toy":
        for name in ("bias", "norms", "cos", "sin"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def step(
        self,
        latents: Tensor,
        text: Tensor,
        pooled: Tensor,
        bias: Tensor,
        rope: Rope,
        attend: Callable[[Sequence[Stream], Rope], Tensor],
    ) -> Tensor:
        """New latents [n, C]. A double block, then a single block. `text`: [n_txt, width]; `bias`: own rows."""
        num_text, (num_image, channels) = len(text), latents.shape
        image = torch.nn.functional.pad(latents.to(text.dtype), (0, self.width - channels))
        hidden = torch.cat([text, image])
        for layer in range(NUM_LAYERS):
            qkv = bias + hidden.repeat(1, 3)
            if layer < NUM_LAYERS - 1:
                parts = qkv.split([num_text, num_image])
                streams = [Stream(part, self.norms[2 * i], self.norms[2 * i + 1]) for i, part in enumerate(parts)]
            else:
                streams = [Stream(qkv, self.norms[0], self.norms[1])]
            hidden = 0.5 * hidden + attend(streams, rope)
        return 0.9 * latents + 0.1 * hidden[num_text:, :channels].float() + 0.01 * pooled.float()


def first_state(layout: SlabLayout, num_text: int, num_image: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """text, pooled, latents of a new request, fp32."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((num_text, layout.text_dim), (layout.pooled_dim,), (num_image, layout.in_channels))
    text, pooled, latents = (torch.randn(shape, generator=generator) for shape in shapes)
    return text, pooled, latents
