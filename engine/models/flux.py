"""FLUX.1's transformer (MMDiT: double-stream, then single-stream blocks) on one member's tokens of a sequence.

Owns the forward pass, modulations, rotary tables. Knows nothing of
devices, groups or requests: the operators, and attention over the whole sequence, are arguments.
Source: black-forest-labs/flux `model.py`; diffusers' FluxTransformer2DModel, whose results it reproduces.

Shapes: n tokens of this member (n_txt + n_img), C hidden size, S steps, V modulation vectors.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor

from tetrion.engine.config import LoadFormat
from tetrion.engine.families.checkpoint import component_folder
from tetrion.engine.families.flux import (
    VECTORS_AT_END,
    VECTORS_PER_SINGLE,
    VECTORS_PER_STREAM,
    FluxConfig,
    read_config,
    weights_plan,
)
from tetrion.engine.families.pictures import AROUND
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.autoencoders import Autoencoder, begins_with_a_picture, unused_parts
from tetrion.engine.models.dummy import module_shapes
from tetrion.engine.models.encoders import ClipEncoder, T5Encoder, one_thread
from tetrion.engine.models.family import Attend, Begin, Beginning, Constant, Model, ToDevice, Tokens
from tetrion.engine.models.layers import (
    Embedder,
    SingleBlock,
    StreamBlock,
    Sum,
    linear_of,
    normed,
    rotary_angles,
    take,
    time_conditioning,
)
from tetrion.engine.models.loading import Component, component_tensors
from tetrion.engine.models.ops import Linear, Ops
from tetrion.engine.models.sources import component_files, whole
from tetrion.engine.parallel.exchange import Rope, Stream
from tetrion.engine.params import Params
from tetrion.engine.sampling.flow_match import Schedule, euler_schedule
from tetrion.engine.shape import StepShape

ROPE_THETA = 10_000.0

TEXT, IMAGE, REFERENCE = 0, 1, 2
"""Segments, in canonical order. References go through a step as the image does, and are thrown away behind it; only
FLUX.1 Kontext has any."""
ENCODING = ("text_in.", "image_in.")
"""See `models.family.FamilyModule`."""


def transformer_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that `transformer/config.json` means, by their names in a diffusers checkpoint."""
    config = json.loads((folder / "config.json").read_bytes())
    return module_shapes(functools.partial(FluxTransformer2DModel.from_config, config))


@dataclass(frozen=True, slots=True)
class DoubleBlock:
    text: StreamBlock
    image: StreamBlock


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


def build_weights(config: FluxConfig, tensors: Mapping[str, Tensor]) -> FluxWeights:
    """Arrange tensors named as in `weights_plan`. No copies."""
    layer = functools.partial(linear_of, tensors)

    return FluxWeights(
        image_in=layer("image_in"),
        text_in=layer("text_in"),
        time_in=Embedder.of(tensors, "time_in"),
        guidance_in=Embedder.of(tensors, "guidance_in") if config.guidance_embeds else None,
        pooled_in=Embedder.of(tensors, "pooled_in"),
        modulation=layer("modulation"),
        double_blocks=tuple(
            DoubleBlock(*(StreamBlock.of(tensors, f"double.{i}.{stream}") for stream in ("text", "image")))
            for i in range(config.num_layers)
        ),
        single_blocks=tuple(SingleBlock.of(tensors, f"single.{i}") for i in range(config.num_single_layers)),
        final=layer("final"),
    )


def modulations(ops: Ops, weights: FluxWeights, timesteps: Tensor, guidance: float, pooled: Tensor) -> Tensor:
    """Every block's shift, scale and gate vectors for all steps of a request: [S, V, C].

    timesteps: [S] fp32, as the scheduler gives them (0 … 1000); pooled: [pooled_dim]. They depend on nothing else, so
    3.2 of FLUX.1's 12 billion weights are read once a request instead of once a step.
    """
    dtype = pooled.dtype
    parts = weights.time_in, weights.guidance_in
    conditioning = time_conditioning(ops, *parts, timesteps, guidance, dtype)
    conditioning = conditioning + weights.pooled_in(ops, pooled.unsqueeze(0))
    hidden_size = conditioning.shape[-1]
    return ops.linear(ops.silu(conditioning), weights.modulation).view(len(timesteps), -1, hidden_size)


def rope(
    height: int,
    width: int,
    num_text: int,
    axes_dims: Sequence[int],
    references: Sequence[tuple[int, int]] = (),
    theta: float = ROPE_THETA,
) -> Rope:
    """Rotary tables of a whole sequence: cos, sin [num_text + height · width + …, head_dim / 2]; sizes in tokens, of
    references (rows, columns).

    Positions are (0, row, column) for image tokens, (i, row, column) for those of the i-th reference, from 1, and
    (0, 0, 0) for text. Angles in fp64, tables in fp32, one value for each pair of channels that turn together.
    """
    text = torch.zeros(num_text, len(axes_dims), dtype=torch.float64)
    grids = [_grid(i, *size, len(axes_dims)) for i, size in enumerate([(height, width), *references])]
    angles = rotary_angles(torch.cat([text, *grids]), axes_dims, theta)
    return angles.cos().float(), angles.sin().float()


def _grid(index: int, rows: int, columns: int, num_axes: int) -> Tensor:
    """Positions of a picture's tokens: [rows · columns, axes]."""
    grid = torch.zeros(rows, columns, num_axes, dtype=torch.float64)
    grid[..., 0] = index
    grid[..., 1] += torch.arange(rows)[:, None]
    grid[..., 2] += torch.arange(columns)[None, :]
    return grid.flatten(0, 1)


def project_text(ops: Ops, weights: FluxWeights, prompt_embeds: Tensor) -> Tensor:
    """Prompt embeddings [n_txt, text_dim] -> text tokens [n_txt, C]. The same for all steps of a request."""
    return ops.linear(prompt_embeds, weights.text_in)


def step(
    ops: Ops,
    weights: FluxWeights,
    latents: Tensor,
    text: Tensor,
    vectors: Tensor,
    attend: Attend,
    reference: Tensor | None = None,
    around: Tensor | None = None,
) -> Tensor:
    """Velocity [n_img, out_channels] at one step, for this member's tokens.

    latents: [n_img, out_channels]; text: [n_txt, C] from `project_text`; vectors: the step's row of `modulations`, or
    all of it, where `ops` knows the step; reference: [n_ref, C]; around: [n_img, in_channels - out_channels].
    """
    rows = iter(vectors.unbind(-2))
    pictures: tuple[int, ...] = (IMAGE,)
    x = ops.linear(latents if around is None else torch.cat([latents, around], dim=1), weights.image_in)
    if reference is not None and len(reference):
        pictures, x = (IMAGE, REFERENCE), torch.cat([x, reference])
    streams = [Sum(text), Sum(x)]
    for block in weights.double_blocks:
        text_vectors, image_vectors = take(rows, VECTORS_PER_STREAM), take(rows, VECTORS_PER_STREAM)
        streams = _double_block(ops, block, streams, (text_vectors, image_vectors), pictures, attend)
    for single in weights.single_blocks:
        streams = [_single_block(ops, single, streams, take(rows, VECTORS_PER_SINGLE), pictures, attend)]
    scale, shift = take(rows, VECTORS_AT_END)
    first = 0 if len(streams) == 2 else len(text)
    image = streams[-1].rows(first, first + len(latents))
    ((_, modulated),) = ops.residual_modulate([image.branch(shift, scale)])
    return ops.narrow_linear(modulated, weights.final)


def _double_block(
    ops: Ops,
    block: DoubleBlock,
    streams: Sequence[Sum],
    vectors: tuple[Sequence[Tensor], Sequence[Tensor]],
    pictures: tuple[int, ...],
    attend: Attend,
) -> list[Sum]:
    """`streams`, `vectors`: text's and image's. `pictures`: the segments that the image's has."""
    layers = block.text, block.image
    xs, modulated = normed(ops, streams, [(v[0], v[1]) for v in vectors])
    attended = attend(
        [
            Stream(ops.linear(n, layer.qkv), segments, layer.q_norm, layer.k_norm)
            for n, layer, segments in zip(modulated, layers, ((TEXT,), pictures), strict=True)
        ]
    ).split([len(x) for x in xs])
    outs = [ops.linear(part, layer.out) for part, layer in zip(attended, layers, strict=True)]
    sums = [Sum(x, v[2], out) for x, v, out in zip(xs, vectors, outs, strict=True)]
    xs, modulated = normed(ops, sums, [(v[3], v[4]) for v in vectors])
    outs = [
        ops.linear(ops.gelu_linear(n, layer.mlp_in), layer.mlp_out) for n, layer in zip(modulated, layers, strict=True)
    ]
    return [Sum(x, v[5], out) for x, v, out in zip(xs, vectors, outs, strict=True)]


def _single_block(
    ops: Ops,
    block: SingleBlock,
    streams: Sequence[Sum],
    vectors: Sequence[Tensor],
    pictures: tuple[int, ...],
    attend: Attend,
) -> Sum:
    """`streams`: text's and image's, or both in one, as all blocks but the first have it."""
    shift, scale, gate = vectors
    x, modulated = (
        parts[0] if len(parts) == 1 else torch.cat(parts)
        for parts in normed(ops, streams, [(shift, scale)] * len(streams))
    )
    attended = attend([Stream(ops.linear(modulated, block.qkv), (TEXT, *pictures), block.q_norm, block.k_norm)])
    return Sum(x, gate, ops.joined_linear(attended, ops.gelu_linear(modulated, block.mlp_in), block.out))


class FluxTransformer:
    """The network of `models.family.Network`: config, weights and operators together."""

    def __init__(self, config: FluxConfig, tensors: Mapping[str, Tensor], ops: Ops, size_multiple: int) -> None:
        """`size_multiple`: pixels of an image token's side."""
        self.config, self._unit = config, size_multiple
        self.weights = build_weights(config, tensors)
        self.ops = ops
        self.num_vectors, self.hidden_size, self.out_channels = (
            config.num_vectors,
            config.hidden_size,
            config.token_width,
        )

    def vectors(self, fields: Mapping[str, Tensor], times: Tensor, params: Params) -> Tensor:
        return modulations(self.ops, self.weights, times, params.guidance, fields["pooled"][0])

    def constants(self, fields: Mapping[str, Tensor], shape: StepShape, branch: int) -> Mapping[str, Constant]:
        constants = {"text": Constant(fields["text"][: shape.text[branch]], TEXT)}
        if "reference" in fields:
            constants["reference"] = Constant(fields["reference"][: shape.reference], REFERENCE)
        if AROUND in fields:
            constants[AROUND] = Constant(fields[AROUND][: shape.image], IMAGE)
        return constants

    def rope(self, shape: StepShape, branch: int) -> Rope:
        unit = self._unit
        rows, columns = shape.height // unit, shape.width // unit
        references = [(height // unit, width // unit) for width, height in shape.references]
        return rope(rows, columns, shape.text[branch], self.config.axes_dims_rope, references)

    def step(self, latents: Tensor, constants: Mapping[str, Tensor], vectors: Tensor, attend: Attend) -> Tensor:
        text, reference, around = constants["text"], constants.get("reference"), constants.get(AROUND)
        return step(self.ops, self.weights, latents, text, vectors, attend, reference, around)


class FluxText:
    """CLIP's pooled vector and T5's rows, projected to what the blocks take."""

    def __init__(self, clip: ClipEncoder, t5: T5Encoder, network: FluxTransformer) -> None:
        self._clip, self._t5, self._network = clip, t5, network

    def tokens(self, prompt: str) -> Tokens:
        return Tokens((self._clip.ids(prompt), self._t5.ids(prompt)), self._t5.num_tokens(prompt))

    @torch.no_grad()
    def embed(self, ids: Sequence[Tensor]) -> dict[str, Tensor]:
        clip_ids, t5_ids = ids
        with one_thread():
            pooled, embeds = self._clip.pooled(clip_ids), self._t5.rows(t5_ids)
        return {"text": project_text(self._network.ops, self._network.weights, embeds), "pooled": pooled.unsqueeze(0)}


def _begins_with_references(codec: Autoencoder, network: FluxTransformer) -> Begin:
    """Noise, and each picture as rows of the sequence, projected as the image is."""

    @torch.no_grad()
    def begin(params: Params, pictures: Sequence[Tensor], to_device: ToDevice) -> Beginning:
        state, image_in = codec.noise(params.seed, params.shape), network.weights.image_in
        if not pictures:
            return Beginning(state)
        latents = torch.cat([codec.reference(picture) for picture in pictures])
        return Beginning(state, {"reference": network.ops.linear(latents.to(image_in.weight.dtype), image_in)})

    return begin


def components(spec: ModelSpec, load_format: LoadFormat) -> dict[str, Component]:
    path = Path(spec.path)
    config = read_config(component_folder(path, "transformer") / "config.json")
    files = component_files(
        path,
        load_format,
        {
            "text_encoder": ClipEncoder.shapes,
            "text_encoder_2": T5Encoder.shapes,
            "vae": Autoencoder.shapes,
            "transformer": transformer_shapes,
        },
    )
    return {
        "text_encoder": whole(files["text_encoder"]),
        "text_encoder_2": whole(files["text_encoder_2"]),
        "vae": whole(files["vae"], without=unused_parts(spec)),
        "transformer": Component(files["transformer"], weights_plan(config)),
    }


def network(spec: ModelSpec, tensors: Mapping[str, Tensor], ops: Ops) -> FluxTransformer:
    config = read_config(component_folder(Path(spec.path), "transformer") / "config.json")
    return FluxTransformer(config, tensors, ops, spec.sizes.multiple)


def build(spec: ModelSpec, load_format: LoadFormat, tensors: Mapping[str, Tensor], ops: Ops) -> Model:
    path = Path(spec.path)
    parts = {
        name: component_tensors(tensors, name) for name in ("transformer", "vae", "text_encoder", "text_encoder_2")
    }
    transformer = network(spec, parts["transformer"], ops)
    clip = ClipEncoder(
        component_folder(path, "text_encoder"), component_folder(path, "tokenizer"), parts["text_encoder"], load_format
    )
    t5 = T5Encoder(
        component_folder(path, "text_encoder_2"),
        component_folder(path, "tokenizer_2"),
        parts["text_encoder_2"],
        load_format,
        spec.max_text_tokens,
    )
    codec = Autoencoder(component_folder(path, "vae"), parts["vae"], spec)

    def schedule(num_steps: int, shape: StepShape) -> Schedule:
        return euler_schedule(spec.scheduler, num_steps, shape.image)

    begin = begins_with_a_picture(codec, schedule)
    return Model(
        spec=spec,
        network=transformer,
        text=FluxText(clip, t5, transformer),
        codec=codec,
        begin=_begins_with_references(codec, transformer) if spec.takes_references else begin,
        schedule=schedule,
        guidance_factor=lambda params: params.true_cfg_scale,
    )
