"""FLUX.2's transformer (double-stream, then single-stream blocks) on one member's rows of a sequence. Modulations are
the same for all blocks of a kind, MLPs are gated, no layer has a bias.

Owns the forward pass, modulations, rotary tables, how prompts become text rows. Knows nothing of devices, groups or
requests: the operators, and attention over the whole sequence, are arguments.
Source: black-forest-labs/flux2 `model.py`; diffusers' Flux2Transformer2DModel, Flux2KleinPipeline and Flux2Pipeline,
whose results it reproduces.

Shapes: n rows of this member (n_txt + n_img), C hidden size, S steps, V modulation vectors.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from torch import Tensor

from tetrion.engine.config import LoadFormat
from tetrion.engine.families.checkpoint import component_folder
from tetrion.engine.families.components import Flux2VaeConfig
from tetrion.engine.families.flux2 import (
    KLEIN,
    NUM_VECTORS,
    VECTORS_AT_END,
    VECTORS_PER_SINGLE,
    VECTORS_PER_STREAM,
    Flux2Config,
    dynamic_shift,
    prompt_reader,
    read_config,
    text_kind,
    weights_plan,
)
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.autoencoders import Autoencoder, unused_parts
from tetrion.engine.models.dummy import module_shapes
from tetrion.engine.models.encoders import one_thread
from tetrion.engine.models.family import Attend, Begin, Beginning, Constant, Model, ToDevice, Tokens
from tetrion.engine.models.language_encoders import (
    MISTRAL3,
    QWEN3,
    LanguageEncoder,
    LanguageKind,
    language_component,
    language_shapes_of,
)
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
from tetrion.engine.sampling.flow_match import Schedule, euler_schedule, pack_latents, unpack_latents
from tetrion.engine.shape import StepShape

ENCODING = ("text_in.",)
"""See `models.family.FamilyModule`."""
TEXT, IMAGE, REFERENCE = 0, 1, 2
"""Segments, in canonical order. References go through a step as the image does, and are thrown away behind it."""
REFERENCE_TIME = 10
"""The first axis is that of time: references are so far apart."""


def transformer_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that `transformer/config.json` means, by their names in a diffusers checkpoint."""
    config = json.loads((folder / "config.json").read_bytes())
    return module_shapes(functools.partial(Flux2Transformer2DModel.from_config, config))


@dataclass(frozen=True, slots=True)
class Flux2Weights:
    """All of the transformer. `double_blocks`: text's and image's half of each. `modulation` computes all vectors from
    one conditioning vector: [V·C, C]."""

    image_in: Linear
    text_in: Linear
    time_in: Embedder
    guidance_in: Embedder | None
    modulation: Linear
    double_blocks: tuple[tuple[StreamBlock, StreamBlock], ...]
    single_blocks: tuple[SingleBlock, ...]
    final: Linear


def build_weights(config: Flux2Config, tensors: Mapping[str, Tensor]) -> Flux2Weights:
    """Arrange tensors named as in `weights_plan`. No copies."""
    layer = functools.partial(linear_of, tensors)

    return Flux2Weights(
        image_in=layer("image_in"),
        text_in=layer("text_in"),
        time_in=Embedder.of(tensors, "time_in"),
        guidance_in=Embedder.of(tensors, "guidance_in") if config.guidance_embeds else None,
        modulation=layer("modulation"),
        double_blocks=tuple(
            (StreamBlock.of(tensors, f"double.{i}.text"), StreamBlock.of(tensors, f"double.{i}.image"))
            for i in range(config.num_layers)
        ),
        single_blocks=tuple(SingleBlock.of(tensors, f"single.{i}") for i in range(config.num_single_layers)),
        final=layer("final"),
    )


class Vectors(NamedTuple):
    """A step's, of all blocks: shift, scale, gate, for a stream's MLP once more; scale and shift behind all blocks."""

    text: tuple[Tensor, ...]
    image: tuple[Tensor, ...]
    single: tuple[Tensor, ...]
    end: tuple[Tensor, ...]

    @classmethod
    def of(cls, table: Tensor) -> "Vectors":
        """table: [S, V, C]."""
        rows = iter(table.unbind(-2))
        counts = (VECTORS_PER_STREAM, VECTORS_PER_STREAM, VECTORS_PER_SINGLE, VECTORS_AT_END)
        return cls(*(take(rows, count) for count in counts))


def modulations(ops: Ops, weights: Flux2Weights, timesteps: Tensor, guidance: float, dtype: torch.dtype) -> Tensor:
    """All blocks' shift, scale and gate vectors for all steps of a request: [S, V, C].

    timesteps: [S] fp32, as the scheduler gives them (0 … 1000).
    """
    parts = weights.time_in, weights.guidance_in
    conditioning = time_conditioning(ops, *parts, timesteps, guidance, dtype)
    hidden_size = conditioning.shape[-1]
    return ops.linear(ops.silu(conditioning), weights.modulation).view(len(timesteps), -1, hidden_size)


def rope(
    config: Flux2Config, rows: int, columns: int, num_text: int, references: Sequence[tuple[int, int]] = ()
) -> Rope:
    """Rotary tables of a whole sequence: cos, sin [num_text + rows · columns + …, head_dim / 2]; sizes in tokens, of
    references (rows, columns). Positions are (0, 0, 0, i) for text, (0, row, column, 0) for the picture, (10 i, row,
    column, 0) for the i-th reference, from 1."""
    text = torch.zeros(num_text, 4)
    text[:, 3] = torch.arange(num_text)
    grids = [_grid(REFERENCE_TIME * i, *size) for i, size in enumerate([(rows, columns), *references])]
    angles = rotary_angles(torch.cat([text, *grids]), config.axes_dims_rope, config.rope_theta)
    return angles.cos().float(), angles.sin().float()


def _grid(time: int, rows: int, columns: int) -> Tensor:
    """Positions of a picture's tokens: [rows · columns, 4]."""
    grid = torch.zeros(rows * columns, 4)
    grid[:, 0] = time
    grid[:, 1:3] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2)
    return grid


def step(
    ops: Ops,
    weights: Flux2Weights,
    latents: Tensor,
    text: Tensor,
    table: Tensor,
    attend: Attend,
    reference: Tensor | None = None,
) -> Tensor:
    """Velocity [n_img, in_channels] at one step, for this member's rows.

    latents: [n_img, in_channels]; text: [n_txt, C], projected; table: all of `modulations`, of which `ops` knows the
    step; reference: latents of all references, [n_ref, in_channels].
    """
    vectors = Vectors.of(table)
    pictures: tuple[int, ...] = (IMAGE,)
    x = latents
    if reference is not None and len(reference):
        pictures, x = (IMAGE, REFERENCE), torch.cat([latents, reference])
    streams = [Sum(text), Sum(ops.linear(x, weights.image_in))]
    for double in weights.double_blocks:
        streams = _double_block(ops, double, streams, (vectors.text, vectors.image), pictures, attend)
    for single in weights.single_blocks:
        streams = [_single_block(ops, single, streams, vectors.single, pictures, attend)]
    scale, shift = vectors.end
    first = 0 if len(streams) == 2 else len(text)
    image = streams[-1].rows(first, first + len(latents))
    ((_, modulated),) = ops.residual_modulate([image.branch(shift, scale)])
    return ops.narrow_linear(modulated, weights.final)


def _double_block(
    ops: Ops,
    block: Sequence[StreamBlock],
    streams: Sequence[Sum],
    vectors: Sequence[Sequence[Tensor]],
    pictures: tuple[int, ...],
    attend: Attend,
) -> list[Sum]:
    """All of text's and of the pictures'. `pictures`: their segments."""
    xs, modulated = normed(ops, streams, [(v[0], v[1]) for v in vectors])
    attended = attend(
        [
            Stream(ops.linear(n, layer.qkv), segments, layer.q_norm, layer.k_norm)
            for n, layer, segments in zip(modulated, block, ((TEXT,), pictures), strict=True)
        ]
    ).split([len(x) for x in xs])
    outs = [ops.linear(part, layer.out) for part, layer in zip(attended, block, strict=True)]
    sums = [Sum(x, v[2], out) for x, v, out in zip(xs, vectors, outs, strict=True)]
    xs, modulated = normed(ops, sums, [(v[3], v[4]) for v in vectors])
    outs = [
        ops.linear(ops.gated_linear(n, layer.mlp_in), layer.mlp_out) for n, layer in zip(modulated, block, strict=True)
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
    """`streams`: text's and the pictures', or both in one, as all blocks but the first have it."""
    shift, scale, gate = vectors
    x, modulated = (
        parts[0] if len(parts) == 1 else torch.cat(parts)
        for parts in normed(ops, streams, [(shift, scale)] * len(streams))
    )
    attended = attend([Stream(ops.linear(modulated, block.qkv), (TEXT, *pictures), block.q_norm, block.k_norm)])
    return Sum(x, gate, ops.joined_linear(attended, ops.gated_linear(modulated, block.mlp_in), block.out))


class Flux2Transformer:
    """The network of `models.family.Network`: config, weights and operators together."""

    def __init__(self, config: Flux2Config, tensors: Mapping[str, Tensor], ops: Ops, size_multiple: int) -> None:
        """`size_multiple`: pixels of an image token's side."""
        self.config, self._unit = config, size_multiple
        self.weights = build_weights(config, tensors)
        self.ops = ops
        self.num_vectors, self.hidden_size, self.out_channels = NUM_VECTORS, config.hidden_size, config.in_channels

    def vectors(self, fields: Mapping[str, Tensor], times: Tensor, params: Params) -> Tensor:
        return modulations(self.ops, self.weights, times, params.guidance, fields["text"].dtype)

    def constants(self, fields: Mapping[str, Tensor], shape: StepShape, branch: int) -> Mapping[str, Constant]:
        constants = {"text": Constant(fields["text"][: shape.text[branch]], TEXT)}
        if "reference" in fields:
            constants["reference"] = Constant(fields["reference"][: shape.reference], REFERENCE)
        return constants

    def rope(self, shape: StepShape, branch: int) -> Rope:
        unit = self._unit
        references = [(height // unit, width // unit) for width, height in shape.references]
        return rope(self.config, shape.height // unit, shape.width // unit, shape.text[branch], references)

    def step(self, latents: Tensor, constants: Mapping[str, Tensor], vectors: Tensor, attend: Attend) -> Tensor:
        text, reference = constants["text"], constants.get("reference")
        return step(self.ops, self.weights, latents, text, vectors, attend, reference)


class Flux2Text:
    """Rows of three of a language model's layers side by side, projected to what the blocks take."""

    def __init__(self, encoder: LanguageEncoder, network: Flux2Transformer) -> None:
        self._encoder, self._network = encoder, network

    def tokens(self, prompt: str) -> Tokens:
        ids, is_own, num_tokens = self._encoder.ids(prompt)
        return Tokens((ids, is_own), num_tokens)

    @torch.no_grad()
    def embed(self, ids: Sequence[Tensor]) -> dict[str, Tensor]:
        with one_thread():
            rows = self._encoder.rows(*ids)
        return {"text": self._network.ops.linear(rows, self._network.weights.text_in)}


class Flux2Codec(Autoencoder):
    """Latents are packed before they are noised: noise is drawn as [4 · channels, rows, columns] of tokens."""

    KIND = AutoencoderKLFlux2
    CONFIG = Flux2VaeConfig
    UNUSED = ("bn.num_batches_tracked",)

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
        super().__init__(folder, tensors, spec)
        norm = self._vae.bn
        self._mean, self._deviation = norm.running_mean.float(), (norm.running_var.float() + norm.eps).sqrt()

    def noise(self, seed: int, shape: StepShape) -> Tensor:
        rows, columns = shape.height // self._size_multiple, shape.width // self._size_multiple
        generator = torch.Generator("cpu").manual_seed(seed)
        size = (1, 4 * self._num_channels, rows, columns)
        return torch.randn(size, generator=generator, dtype=torch.float32)[0].flatten(1).T.contiguous()

    def reference(self, picture: Tensor) -> Tensor:
        """See `Autoencoder`."""
        mean, _ = self._distribution(picture).chunk(2)
        return (pack_latents(mean) - self._mean) / self._deviation

    def _decodable(self, latents: Tensor, rows: int, columns: int) -> Tensor:
        return unpack_latents(latents * self._deviation + self._mean, rows, columns)


def _begins_with_references(codec: Flux2Codec, dtype: torch.dtype) -> Begin:
    """Noise, and latents of each picture, in one segment."""

    def begin(params: Params, pictures: Sequence[Tensor], to_device: ToDevice) -> Beginning:
        state = codec.noise(params.seed, params.shape)
        if not pictures:
            return Beginning(state)
        return Beginning(state, {"reference": torch.cat([codec.reference(each) for each in pictures]).to(dtype)})

    return begin


def schedule(spec: ModelSpec, num_steps: int, shape: StepShape) -> Schedule:
    return euler_schedule(spec.scheduler, num_steps, shape.image, dynamic_shift=dynamic_shift(shape.image, num_steps))


def components(spec: ModelSpec, load_format: LoadFormat) -> dict[str, Component]:
    path = Path(spec.path)
    config = read_config(component_folder(path, "transformer") / "config.json")
    kind, num_layers = _language_kind(path), text_kind(path).num_layers
    files = component_files(
        path,
        load_format,
        {
            "text_encoder": language_shapes_of(kind, num_layers),
            "vae": Flux2Codec.shapes,
            "transformer": transformer_shapes,
        },
    )
    encoder = component_folder(path, "text_encoder")
    return {
        "text_encoder": language_component(kind, encoder, files["text_encoder"], num_layers),
        "vae": whole(files["vae"], without=(*unused_parts(spec), *Flux2Codec.UNUSED)),
        "transformer": Component(files["transformer"], weights_plan(config)),
    }


def network(spec: ModelSpec, tensors: Mapping[str, Tensor], ops: Ops) -> Flux2Transformer:
    config = read_config(component_folder(Path(spec.path), "transformer") / "config.json")
    return Flux2Transformer(config, tensors, ops, spec.sizes.multiple)


def build(spec: ModelSpec, load_format: LoadFormat, tensors: Mapping[str, Tensor], ops: Ops) -> Model:
    path = Path(spec.path)
    transformer = network(spec, component_tensors(tensors, "transformer"), ops)
    folder, own = component_folder(path, "text_encoder"), component_tensors(tensors, "text_encoder")
    encoder = LanguageEncoder(_language_kind(path), folder, own, text_kind(path).layers, prompt_reader(path))
    codec = Flux2Codec(component_folder(path, "vae"), component_tensors(tensors, "vae"), spec)
    return Model(
        spec=spec,
        network=transformer,
        text=Flux2Text(encoder, transformer),
        codec=codec,
        begin=_begins_with_references(codec, transformer.weights.image_in.weight.dtype),
        schedule=functools.partial(schedule, spec),
        guidance_factor=lambda params: params.guidance,
    )


def _language_kind(path: Path) -> LanguageKind:
    return QWEN3 if text_kind(path) is KLEIN else MISTRAL3
