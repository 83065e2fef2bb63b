"""Qwen-Image's transformer (double-stream blocks) on one member's rows of a sequence.

Owns the forward pass, modulations, rotary tables, how prompts become text rows. Knows nothing of devices, groups or
requests: the operators, and attention over the whole sequence, are arguments.
Source: arXiv:2508.02324; diffusers' QwenImageTransformer2DModel and QwenImagePipeline, whose results it reproduces.

Shapes: n rows of this member, C hidden size, S steps, V modulation vectors.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from torch import Tensor

from tetrion.engine.config import LoadFormat
from tetrion.engine.families.checkpoint import component_folder
from tetrion.engine.families.components import read_qwen25_vl
from tetrion.engine.families.qwenimage import (
    VECTORS,
    VECTORS_AT_END,
    QwenImageConfig,
    prompt_reader,
    read_config,
    weights_plan,
)
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.autoencoders import begins_with_a_picture
from tetrion.engine.models.dummy import module_shapes
from tetrion.engine.models.encoders import one_thread
from tetrion.engine.models.family import Attend, Constant, Model, Tokens
from tetrion.engine.models.language_encoders import (
    QWEN25_VL,
    LanguageEncoder,
    language_component,
    language_shapes_of,
)
from tetrion.engine.models.layers import Embedder, StreamBlock, Sum, linear_of, normed, take, timestep_embedding
from tetrion.engine.models.loading import Component, component_tensors
from tetrion.engine.models.ops import Linear, Ops
from tetrion.engine.models.qwen_image_vae import QwenImageCodec
from tetrion.engine.models.sources import component_files
from tetrion.engine.parallel.exchange import Rope, Stream
from tetrion.engine.params import Params
from tetrion.engine.sampling.flow_match import Schedule, euler_schedule
from tetrion.engine.shape import StepShape
from tetrion.kernels import reference

ENCODING = ("text_norm", "text_in.")
ROPE_THETA = 10_000.0
TEXT, IMAGE, REFERENCE = 0, 1, 2
"""Segments, in canonical order. References go through a step as the image does, and are thrown away behind it."""


def transformer_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that `transformer/config.json` means, by their names in a diffusers checkpoint."""
    config = json.loads((folder / "config.json").read_bytes())
    return module_shapes(functools.partial(QwenImageTransformer2DModel.from_config, config))


@dataclass(frozen=True, slots=True)
class Block:
    """`modulation`: of text's vectors, then of the image's, [12·C, C]."""

    text: StreamBlock
    image: StreamBlock
    modulation: Linear

    @property
    def image_modulation(self) -> Linear:
        weight, bias = self.modulation.weight, self.modulation.bias
        assert bias is not None
        return Linear(weight[len(weight) // 2 :], bias[len(bias) // 2 :])


@dataclass(frozen=True, slots=True)
class QwenImageWeights:
    """All of the transformer."""

    image_in: Linear
    text_norm: Tensor
    text_in: Linear
    time_in: Embedder
    blocks: tuple[Block, ...]
    modulation_at_end: Linear
    final: Linear


def build_weights(config: QwenImageConfig, tensors: Mapping[str, Tensor]) -> QwenImageWeights:
    """Arrange tensors named as in `weights_plan`. No copies."""
    layer = functools.partial(linear_of, tensors)

    def block(i: int) -> Block:
        text, image = (StreamBlock.of(tensors, f"block.{i}.{stream}") for stream in ("text", "image"))
        return Block(text, image, layer(f"block.{i}.modulation"))

    return QwenImageWeights(
        image_in=layer("image_in"),
        text_norm=tensors["text_norm"],
        text_in=layer("text_in"),
        time_in=Embedder.of(tensors, "time_in"),
        blocks=tuple(block(i) for i in range(config.num_layers)),
        modulation_at_end=layer("modulation_at_end"),
        final=layer("final"),
    )


def modulations(
    ops: Ops, weights: QwenImageWeights, config: QwenImageConfig, timesteps: Tensor, dtype: torch.dtype
) -> Tensor:
    """Every block's shift, scale and gate vectors for all steps of a request: [S, V, C].

    timesteps: [S] fp32, as the scheduler gives them (0 … 1000).
    """

    def conditioning(times: Tensor) -> Tensor:
        return ops.silu(weights.time_in(ops, timestep_embedding(times, scale=1000.0).to(dtype)))

    now = conditioning(timesteps / 1000)
    still = conditioning(torch.zeros_like(timesteps)) if config.zero_cond_t else None
    rows = []
    for block in weights.blocks:
        rows.append(ops.linear(now, block.modulation))
        if still is not None:
            rows.append(ops.linear(still, block.image_modulation))
    rows.append(ops.linear(now, weights.modulation_at_end))
    return torch.cat(rows, dim=1).view(len(timesteps), -1, config.hidden_size)


def rope(
    config: QwenImageConfig, rows: int, columns: int, num_text: int, references: Sequence[tuple[int, int]] = ()
) -> Rope:
    """Rotary tables of a whole sequence: cos, sin [num_text + rows · columns + …, head_dim / 2]; sizes in tokens, of
    references (rows, columns).

    Positions of the picture are (0, row, column), of the i-th reference (i, row, column) from 1, both counted from
    their middle; text goes on behind the end of the largest, the same on all axes. Angles in fp32, as diffusers has
    them.
    """
    sizes = [(rows, columns), *references]
    grids = [
        torch.cartesian_prod(torch.tensor([i]), _centred(height), _centred(width)).view(-1, 3)
        for i, (height, width) in enumerate(sizes)
    ]
    first = max(max(size) // 2 for size in sizes)
    text = torch.arange(first, first + num_text).unsqueeze(1).expand(-1, 3)
    positions = torch.cat([text, *grids])
    angles = []
    for axis, dim in enumerate(config.axes_dims_rope):
        frequencies = 1.0 / torch.pow(ROPE_THETA, torch.arange(0, dim, 2).float().div(dim))
        angles.append(torch.outer(positions[:, axis].float(), frequencies))
    table = torch.cat(angles, dim=1)
    return table.cos(), table.sin()


def _centred(count: int) -> Tensor:
    """Positions of a picture's rows or columns."""
    return torch.arange(count) - (count - count // 2)


def step(
    ops: Ops,
    config: QwenImageConfig,
    weights: QwenImageWeights,
    latents: Tensor,
    text: Tensor,
    vectors: Tensor,
    attend: Attend,
    reference: Tensor | None = None,
) -> Tensor:
    """Velocity [n_img, in_channels] at one step, for this member's rows.

    latents: [n_img, in_channels]; text: [n_txt, C], projected; vectors: all of `modulations`, of which `ops` knows the
    step; reference: [n_ref, C], projected.
    """
    rows = iter(vectors.unbind(-2))
    streams = [Sum(text), Sum(ops.linear(latents, weights.image_in))]
    if reference is not None and len(reference):
        streams.append(Sum(reference))
    for block in weights.blocks:
        of_stream = [take(rows, VECTORS) for _ in range(config.streams_with_vectors)]
        of_stream += [of_stream[IMAGE]] * (len(streams) - len(of_stream))
        streams = _block(ops, block, streams, of_stream[: len(streams)], attend)
    scale, shift = take(rows, VECTORS_AT_END)
    ((_, modulated),) = ops.residual_modulate([streams[IMAGE].branch(shift, scale)])
    return ops.narrow_linear(modulated, weights.final)


def _block(
    ops: Ops, block: Block, streams: Sequence[Sum], vectors: Sequence[Sequence[Tensor]], attend: Attend
) -> list[Sum]:
    """All of text's, the image's and perhaps references', which have the image's weights."""
    layers = [block.text, block.image, block.image][: len(streams)]
    xs, modulated = _normed(ops, streams, [(v[0], v[1]) for v in vectors])
    attended = attend(
        [
            Stream(ops.linear(n, layer.qkv), (segment,), layer.q_norm, layer.k_norm)
            for segment, (n, layer) in enumerate(zip(modulated, layers, strict=True))
        ]
    ).split([len(x) for x in xs])
    outs = [ops.linear(part, layer.out) for part, layer in zip(attended, layers, strict=True)]
    sums = [Sum(x, v[2], out) for x, v, out in zip(xs, vectors, outs, strict=True)]
    xs, modulated = _normed(ops, sums, [(v[3], v[4]) for v in vectors])
    outs = [
        ops.linear(ops.gelu_linear(n, layer.mlp_in), layer.mlp_out) for n, layer in zip(modulated, layers, strict=True)
    ]
    return [Sum(x, v[5], out) for x, v, out in zip(xs, vectors, outs, strict=True)]


def _normed(
    ops: Ops, streams: Sequence[Sum], shifts_scales: Sequence[tuple[Tensor, Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """See `normed`, which takes two streams at once."""
    xs, modulated = normed(ops, streams[:2], shifts_scales[:2])
    if len(streams) > 2:
        more, modulated_more = normed(ops, streams[2:], shifts_scales[2:])
        return xs + more, modulated + modulated_more
    return xs, modulated


class QwenImageTransformer:
    """The network of `models.family.Network`: config, weights and operators together."""

    def __init__(self, config: QwenImageConfig, tensors: Mapping[str, Tensor], ops: Ops, size_multiple: int) -> None:
        """`size_multiple`: pixels of an image token's side."""
        self.config, self._unit = config, size_multiple
        self.weights = build_weights(config, tensors)
        self.ops = ops
        self.num_vectors, self.hidden_size = config.num_vectors, config.hidden_size
        self.out_channels = config.in_channels

    def vectors(self, fields: Mapping[str, Tensor], times: Tensor, params: Params) -> Tensor:
        return modulations(self.ops, self.weights, self.config, times, fields["text"].dtype)

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
        return step(self.ops, self.config, self.weights, latents, text, vectors, attend, reference)


class QwenImageText:
    """A language model's rows behind the form's first tokens, normed and projected to what the blocks take."""

    def __init__(self, encoder: LanguageEncoder, network: QwenImageTransformer, num_dropped: int) -> None:
        self._encoder, self._weights, self._num_dropped = encoder, network.weights, num_dropped

    def tokens(self, prompt: str) -> Tokens:
        ids, is_own, num_tokens = self._encoder.ids(prompt)
        return Tokens((ids, is_own), num_tokens - self._num_dropped)

    @torch.no_grad()
    def embed(self, ids: Sequence[Tensor]) -> dict[str, Tensor]:
        """As many rows as there can be, of which a prompt's own come first."""
        with one_thread():
            embeds = self._encoder.rows(*ids)[self._num_dropped :]
            normed = reference.rms_norm(embeds, reference.EPS, self._weights.text_norm)
            text_in = self._weights.text_in
            return {"text": reference.linear(normed, text_in.weight, text_in.bias)}


def _schedule(spec: ModelSpec, num_steps: int, shape: StepShape) -> Schedule:
    return euler_schedule(spec.scheduler, num_steps, shape.image)


def components(spec: ModelSpec, load_format: LoadFormat) -> dict[str, Component]:
    path = Path(spec.path)
    config = read_config(component_folder(path, "transformer") / "config.json")
    encoder, num_layers = _encoder(spec)
    files = component_files(
        path,
        load_format,
        {
            "text_encoder": language_shapes_of(QWEN25_VL, num_layers, is_normed=True),
            "vae": QwenImageCodec.shapes,
            "transformer": transformer_shapes,
        },
    )
    return {
        "text_encoder": language_component(QWEN25_VL, encoder, files["text_encoder"], num_layers, is_normed=True),
        "vae": QwenImageCodec.component(files["vae"], spec),
        "transformer": Component(files["transformer"], weights_plan(config)),
    }


def network(spec: ModelSpec, tensors: Mapping[str, Tensor], ops: Ops) -> QwenImageTransformer:
    config = read_config(component_folder(Path(spec.path), "transformer") / "config.json")
    return QwenImageTransformer(config, tensors, ops, spec.sizes.multiple)


def build(spec: ModelSpec, load_format: LoadFormat, tensors: Mapping[str, Tensor], ops: Ops) -> Model:
    path = Path(spec.path)
    transformer = network(spec, component_tensors(tensors, "transformer"), ops)
    folder, num_layers = _encoder(spec)
    own, reader = component_tensors(tensors, "text_encoder"), prompt_reader(path)
    encoder = LanguageEncoder(QWEN25_VL, folder, own, [num_layers], reader, is_normed=True)
    codec = QwenImageCodec(component_folder(path, "vae"), component_tensors(tensors, "vae"), spec)
    schedule = functools.partial(_schedule, spec)
    return Model(
        spec=spec,
        network=transformer,
        text=QwenImageText(encoder, transformer, reader.num_dropped),
        codec=codec,
        begin=begins_with_a_picture(codec, schedule),
        schedule=schedule,
        guidance_factor=lambda params: params.guidance,
        keeps_norm=True,
    )


def _encoder(spec: ModelSpec) -> tuple[Path, int]:
    """The text encoder's folder, and how many layers it has."""
    folder = component_folder(Path(spec.path), "text_encoder")
    return folder, read_qwen25_vl(folder, spec.max_text_tokens).num_hidden_layers
