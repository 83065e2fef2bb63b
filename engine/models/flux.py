"""FLUX.1's transformer (MMDiT: double-stream, then single-stream blocks) on one member's tokens of a sequence.

Owns the architecture: its weights' names and shapes, the forward pass, modulations, rotary tables. Knows nothing of
devices, groups or requests: the operators, and attention over the whole sequence, are arguments.
Source: black-forest-labs/flux `model.py`; diffusers' FluxTransformer2DModel, whose results it reproduces.

Shapes: n tokens of this member (n_txt + n_img), C hidden size, S steps, V modulation vectors.
"""

import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple, Protocol

import msgspec
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from msgspec import Meta
from torch import Tensor

from tetrion.engine.model_spec import CheckpointError
from tetrion.engine.models.dummy import module_shapes
from tetrion.engine.models.loading import Part
from tetrion.engine.models.ops import Linear, Ops, ReferenceOps
from tetrion.engine.parallel.exchange import Stream
from tetrion.kernels.reference import Branch

ROPE_THETA = 10_000.0
MLP_RATIO = 4
TIME_CHANNELS = 256
VECTORS_PER_STREAM = 6
VECTORS_PER_SINGLE = 3
VECTORS_AT_END = 2
_Count = Annotated[int, Meta(ge=0, le=1000)]
_Size = Annotated[int, Meta(ge=1, le=1_000_000)]

Rope = tuple[Tensor, Tensor]
"""cos, sin: [n, head_dim] each, text tokens first."""


class Attend(Protocol):
    """Attention over the whole sequence for this member's tokens: two streams (text, image) or one (text then image).

    Applies q/k RMSNorm and rotary embedding. Returns [n_txt + n_img, C].
    """

    def __call__(self, streams: Sequence[Stream], rope: Rope) -> Tensor: ...


class FluxConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of `transformer/config.json` (diffusers' names) that decide the computation."""

    in_channels: _Size
    num_layers: _Count
    num_single_layers: _Count
    attention_head_dim: _Size
    num_attention_heads: _Size
    joint_attention_dim: _Size
    pooled_projection_dim: _Size
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    patch_size: int = 1
    out_channels: int | None = None

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def num_vectors(self) -> int:
        """V: shifts, scales and gates of all blocks, each [C]."""
        doubles = 2 * VECTORS_PER_STREAM * self.num_layers
        return doubles + VECTORS_PER_SINGLE * self.num_single_layers + VECTORS_AT_END


def read_config(path: Path) -> FluxConfig:
    """Read `transformer/config.json`. Raises CheckpointError for what this forward pass does not cover."""
    try:
        config = msgspec.json.decode(path.read_bytes(), type=FluxConfig)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"model: {str(path)!r}: {error}") from None
    if config.patch_size != 1 or config.out_channels not in (None, config.in_channels):
        raise CheckpointError(f"model: {str(path)!r}: patch_size must be 1 and out_channels equal to in_channels")
    if len(config.axes_dims_rope) != 3 or sum(config.axes_dims_rope) != config.attention_head_dim:
        raise CheckpointError(
            f"model: {str(path)!r}: axes_dims_rope {list(config.axes_dims_rope)} must be three numbers that add up to"
            f" attention_head_dim {config.attention_head_dim}"
        )
    if any(dim % 2 for dim in config.axes_dims_rope):
        raise CheckpointError(f"model: {str(path)!r}: axes_dims_rope {list(config.axes_dims_rope)} must be even")
    return config


def transformer_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that `transformer/config.json` means, by their names in a diffusers checkpoint."""
    config = json.loads((folder / "config.json").read_bytes())
    return module_shapes(functools.partial(FluxTransformer2DModel.from_config, config))


@dataclass(frozen=True, slots=True)
class Embedder:
    """Two linear layers with SiLU between."""

    in_layer: Linear
    out_layer: Linear


@dataclass(frozen=True, slots=True)
class StreamBlock:
    """One stream (text or image) of a double block. `qkv`: [3·C, C]."""

    qkv: Linear
    q_norm: Tensor
    k_norm: Tensor
    out: Linear
    mlp_in: Linear
    mlp_out: Linear


@dataclass(frozen=True, slots=True)
class DoubleBlock:
    text: StreamBlock
    image: StreamBlock


@dataclass(frozen=True, slots=True)
class SingleBlock:
    """`out` takes attention and MLP output side by side: [C, C + 4·C]."""

    qkv: Linear
    q_norm: Tensor
    k_norm: Tensor
    mlp_in: Linear
    out: Linear


@dataclass(frozen=True, slots=True)
class FluxWeights:
    """All of the transformer. `modulation` computes every block's vectors from one conditioning vector: [V·C, C]."""

    image_in: Linear
    text_in: Linear
    time_in: Embedder
    guidance_in: Embedder | None
    pooled_in: Embedder
    modulation: Linear
    double_blocks: tuple[DoubleBlock, ...]
    single_blocks: tuple[SingleBlock, ...]
    final: Linear


def weights_plan(config: FluxConfig) -> dict[str, Part]:
    """Name in the image -> tensors of a diffusers checkpoint: q, k, v fused, all modulation projections fused."""
    C, plan = config.hidden_size, dict[str, Part]()

    def add(name: str, sources: Sequence[str], num_out: int, num_in: int) -> None:
        plan[f"{name}.weight"] = Part(tuple(f"{source}.weight" for source in sources), (num_out, num_in))
        plan[f"{name}.bias"] = Part(tuple(f"{source}.bias" for source in sources), (num_out,))

    def add_embedder(name: str, source: str, num_in: int) -> None:
        add(f"{name}.in_layer", [f"{source}.linear_1"], C, num_in)
        add(f"{name}.out_layer", [f"{source}.linear_2"], C, C)

    def add_qkv(name: str, projections: Sequence[str], norms: Sequence[str]) -> None:
        add(f"{name}.qkv", projections, 3 * C, C)
        for norm, source in zip(("q_norm", "k_norm"), norms, strict=True):
            plan[f"{name}.{norm}"] = Part((f"{source}.weight",), (config.attention_head_dim,))

    add("image_in", ["x_embedder"], C, config.in_channels)
    add("text_in", ["context_embedder"], C, config.joint_attention_dim)
    add_embedder("time_in", "time_text_embed.timestep_embedder", TIME_CHANNELS)
    add_embedder("pooled_in", "time_text_embed.text_embedder", config.pooled_projection_dim)
    if config.guidance_embeds:
        add_embedder("guidance_in", "time_text_embed.guidance_embedder", TIME_CHANNELS)
    modulation: list[str] = []
    for i in range(config.num_layers):
        ours, block = f"double.{i}", f"transformer_blocks.{i}"
        attn = f"{block}.attn"
        add_qkv(
            f"{ours}.text",
            [f"{attn}.add_q_proj", f"{attn}.add_k_proj", f"{attn}.add_v_proj"],
            [f"{attn}.norm_added_q", f"{attn}.norm_added_k"],
        )
        add_qkv(
            f"{ours}.image",
            [f"{attn}.to_q", f"{attn}.to_k", f"{attn}.to_v"],
            [f"{attn}.norm_q", f"{attn}.norm_k"],
        )
        add(f"{ours}.text.out", [f"{attn}.to_add_out"], C, C)
        add(f"{ours}.image.out", [f"{attn}.to_out.0"], C, C)
        for stream, mlp in (("text", "ff_context"), ("image", "ff")):
            add(f"{ours}.{stream}.mlp_in", [f"{block}.{mlp}.net.0.proj"], MLP_RATIO * C, C)
            add(f"{ours}.{stream}.mlp_out", [f"{block}.{mlp}.net.2"], C, MLP_RATIO * C)
        modulation += [f"{block}.norm1_context.linear", f"{block}.norm1.linear"]
    for i in range(config.num_single_layers):
        ours, block = f"single.{i}", f"single_transformer_blocks.{i}"
        attn = f"{block}.attn"
        add_qkv(ours, [f"{attn}.to_q", f"{attn}.to_k", f"{attn}.to_v"], [f"{attn}.norm_q", f"{attn}.norm_k"])
        add(f"{ours}.mlp_in", [f"{block}.proj_mlp"], MLP_RATIO * C, C)
        add(f"{ours}.out", [f"{block}.proj_out"], C, (1 + MLP_RATIO) * C)
        modulation.append(f"{block}.norm.linear")
    add("modulation", [*modulation, "norm_out.linear"], config.num_vectors * C, C)
    add("final", ["proj_out"], config.in_channels, C)
    return plan


def build_weights(config: FluxConfig, tensors: Mapping[str, Tensor]) -> FluxWeights:
    """Arrange tensors named as in `weights_plan`. No copies."""

    def layer(name: str) -> Linear:
        return Linear(tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def embedder(name: str) -> Embedder:
        return Embedder(layer(f"{name}.in_layer"), layer(f"{name}.out_layer"))

    def stream(name: str) -> StreamBlock:
        return StreamBlock(
            qkv=layer(f"{name}.qkv"),
            q_norm=tensors[f"{name}.q_norm"],
            k_norm=tensors[f"{name}.k_norm"],
            out=layer(f"{name}.out"),
            mlp_in=layer(f"{name}.mlp_in"),
            mlp_out=layer(f"{name}.mlp_out"),
        )

    def single(name: str) -> SingleBlock:
        return SingleBlock(
            qkv=layer(f"{name}.qkv"),
            q_norm=tensors[f"{name}.q_norm"],
            k_norm=tensors[f"{name}.k_norm"],
            mlp_in=layer(f"{name}.mlp_in"),
            out=layer(f"{name}.out"),
        )

    return FluxWeights(
        image_in=layer("image_in"),
        text_in=layer("text_in"),
        time_in=embedder("time_in"),
        guidance_in=embedder("guidance_in") if config.guidance_embeds else None,
        pooled_in=embedder("pooled_in"),
        modulation=layer("modulation"),
        double_blocks=tuple(
            DoubleBlock(text=stream(f"double.{i}.text"), image=stream(f"double.{i}.image"))
            for i in range(config.num_layers)
        ),
        single_blocks=tuple(single(f"single.{i}") for i in range(config.num_single_layers)),
        final=layer("final"),
    )


def modulations(ops: Ops, weights: FluxWeights, timesteps: Tensor, guidance: float, pooled: Tensor) -> Tensor:
    """Every block's shift, scale and gate vectors for all steps of a request: [S, V, C].

    timesteps: [S] fp32, as the scheduler gives them (0 … 1000); pooled: [pooled_dim]. They depend on nothing else, so
    3.2 of FLUX.1's 12 billion weights are read once a request instead of once a step.
    """
    dtype = pooled.dtype
    # FluxPipeline divides by 1000 and the transformer multiplies again, which is not the identity in fp32.
    conditioning = _embed(ops, weights.time_in, timestep_embedding(timesteps / 1000 * 1000).to(dtype))
    if weights.guidance_in is not None:
        guidance_1 = torch.full((1,), guidance, dtype=torch.float32, device=timesteps.device) * 1000
        conditioning = conditioning + _embed(ops, weights.guidance_in, timestep_embedding(guidance_1).to(dtype))
    conditioning = conditioning + _embed(ops, weights.pooled_in, pooled.unsqueeze(0))
    hidden_size = conditioning.shape[-1]
    return ops.linear(ops.silu(conditioning), weights.modulation).view(len(timesteps), -1, hidden_size)


def _embed(ops: Ops, embedder: Embedder, x: Tensor) -> Tensor:
    return ops.linear(ops.silu(ops.linear(x, embedder.in_layer)), embedder.out_layer)


def timestep_embedding(values: Tensor) -> Tensor:
    """Sinusoidal embedding [S] -> [S, 256], cosines first (arXiv:2006.11239, as FLUX uses it)."""
    half = TIME_CHANNELS // 2
    exponents = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values.float().unsqueeze(1) * torch.exp(exponents).unsqueeze(0)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def rope(height: int, width: int, num_text: int, axes_dims: Sequence[int], theta: float = ROPE_THETA) -> Rope:
    """Rotary tables of a whole sequence: cos, sin [num_text + height · width, head_dim]; sizes in tokens.

    Positions are (0, row, column) for image tokens and (0, 0, 0) for text. Angles in fp64, tables in fp32, each value
    twice (pairs of channels turn together).
    """
    grid = torch.zeros(height, width, len(axes_dims), dtype=torch.float64)
    grid[..., 1] += torch.arange(height)[:, None]
    grid[..., 2] += torch.arange(width)[None, :]
    positions = torch.cat([torch.zeros(num_text, len(axes_dims), dtype=torch.float64), grid.flatten(0, 1)])
    angles = torch.cat(
        [
            torch.outer(positions[:, axis], 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim))
            for axis, dim in enumerate(axes_dims)
        ],
        dim=1,
    )
    return angles.cos().repeat_interleave(2, dim=1).float(), angles.sin().repeat_interleave(2, dim=1).float()


def project_text(ops: Ops, weights: FluxWeights, prompt_embeds: Tensor) -> Tensor:
    """Prompt embeddings [n_txt, text_dim] -> text tokens [n_txt, C]. The same for all steps of a request."""
    return ops.linear(prompt_embeds, weights.text_in)


class Sum(NamedTuple):
    """A stream's hidden states between two blocks, x + gate · y: the next block adds, in one pass with its norm."""

    x: Tensor
    gate: Tensor | None = None
    y: Tensor | None = None

    def branch(self, shift: Tensor, scale: Tensor) -> Branch:
        return Branch(self.x, shift, scale, self.gate, self.y)

    def rows_from(self, first: int) -> "Sum":
        return Sum(self.x[first:], self.gate, None if self.y is None else self.y[first:])


def step(
    ops: Ops, weights: FluxWeights, latents: Tensor, text: Tensor, modulation: Tensor, rope: Rope, attend: Attend
) -> Tensor:
    """Velocity [n_img, in_channels] at one step, for this member's tokens.

    latents: [n_img, in_channels]; text: [n_txt, C] from `project_text`; modulation: [V, C], the step's row of
    `modulations`, or [S, V, C], all of it, where `ops` knows the step; rope: what `attend` wants.
    """
    vectors = iter(modulation.unbind(-2))
    streams = [Sum(text), Sum(ops.linear(latents, weights.image_in))]
    for block in weights.double_blocks:
        text_vectors, image_vectors = _take(vectors, VECTORS_PER_STREAM), _take(vectors, VECTORS_PER_STREAM)
        streams = _double_block(ops, block, streams, (text_vectors, image_vectors), rope, attend)
    for single in weights.single_blocks:
        streams = [_single_block(ops, single, streams, _take(vectors, VECTORS_PER_SINGLE), rope, attend)]
    scale, shift = _take(vectors, VECTORS_AT_END)
    image = streams[1] if len(streams) == 2 else streams[0].rows_from(len(text))
    ((_, normed),) = ops.residual_modulate([image.branch(shift, scale)])
    return ops.narrow_linear(normed, weights.final)


def _double_block(
    ops: Ops,
    block: DoubleBlock,
    streams: Sequence[Sum],
    vectors: tuple[Sequence[Tensor], Sequence[Tensor]],
    rope: Rope,
    attend: Attend,
) -> list[Sum]:
    """`streams`, `vectors`: text's and image's."""
    layers = block.text, block.image
    xs, normed = _normed(ops, streams, [(v[0], v[1]) for v in vectors])
    attended = attend(
        [Stream(ops.linear(n, layer.qkv), layer.q_norm, layer.k_norm) for n, layer in zip(normed, layers, strict=True)],
        rope,
    ).split([len(x) for x in xs])
    outs = [ops.linear(part, layer.out) for part, layer in zip(attended, layers, strict=True)]
    sums = [Sum(x, v[2], out) for x, v, out in zip(xs, vectors, outs, strict=True)]
    xs, normed = _normed(ops, sums, [(v[3], v[4]) for v in vectors])
    outs = [
        ops.linear(ops.gelu_linear(n, layer.mlp_in), layer.mlp_out) for n, layer in zip(normed, layers, strict=True)
    ]
    return [Sum(x, v[5], out) for x, v, out in zip(xs, vectors, outs, strict=True)]


def _single_block(
    ops: Ops, block: SingleBlock, streams: Sequence[Sum], vectors: Sequence[Tensor], rope: Rope, attend: Attend
) -> Sum:
    """`streams`: text's and image's, or both in one, as all blocks but the first have it."""
    shift, scale, gate = vectors
    x, normed = (
        parts[0] if len(parts) == 1 else torch.cat(parts)
        for parts in _normed(ops, streams, [(shift, scale)] * len(streams))
    )
    attended = attend([Stream(ops.linear(normed, block.qkv), block.q_norm, block.k_norm)], rope)
    return Sum(x, gate, ops.joined_linear(attended, ops.gelu_linear(normed, block.mlp_in), block.out))


def _normed(
    ops: Ops, streams: Sequence[Sum], shifts_scales: Sequence[tuple[Tensor, Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Each stream's sum, and that modulated."""
    pairs = ops.residual_modulate([s.branch(*vectors) for s, vectors in zip(streams, shifts_scales, strict=True)])
    return [x for x, _ in pairs], [normed for _, normed in pairs]


def _take(vectors: Iterator[Tensor], count: int) -> tuple[Tensor, ...]:
    return tuple(itertools.islice(vectors, count))


class FluxTransformer:
    """Config, weights and operators together with the rotary tables of recent shapes: what a worker's runner calls."""

    def __init__(self, config: FluxConfig, tensors: Mapping[str, Tensor], ops: Ops | None = None) -> None:
        self.config = config
        self.weights = build_weights(config, tensors)
        self.ops = ReferenceOps() if ops is None else ops
        self._rope = functools.lru_cache(maxsize=32)(rope)

    def rope(self, height: int, width: int, num_text: int) -> Rope:
        """`rope` for this model, cached; sizes in tokens."""
        return self._rope(height, width, num_text, self.config.axes_dims_rope)

    def modulations(self, timesteps: Tensor, guidance: float, pooled: Tensor) -> Tensor:
        return modulations(self.ops, self.weights, timesteps, guidance, pooled)

    def project_text(self, prompt_embeds: Tensor) -> Tensor:
        return project_text(self.ops, self.weights, prompt_embeds)

    def step(self, latents: Tensor, text: Tensor, modulation: Tensor, rope: Rope, attend: Attend) -> Tensor:
        return step(self.ops, self.weights, latents, text, modulation, rope, attend)
