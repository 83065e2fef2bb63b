"""Stable Diffusion 3's transformer (MMDiT of double-stream blocks) on one member's rows of a sequence: SD3-medium,
SD3.5-medium (blocks with a second attention over the image alone) and SD3.5-large.

Owns the forward pass, modulations, positions, how prompts become text
rows. Knows nothing of devices, groups or requests: the operators, and attention over the whole sequence, are arguments.
Source: arXiv:2403.03206; diffusers' SD3Transformer2DModel and StableDiffusion3Pipeline, whose results it reproduces.

Shapes: n rows of this member, C hidden size, S steps, V modulation vectors.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor

from tetrion.engine.config import LoadFormat
from tetrion.engine.families.checkpoint import component_folder
from tetrion.engine.families.sd3 import (
    VECTORS,
    VECTORS_AT_END,
    VECTORS_DUAL,
    SD3Config,
    has_t5,
    read_config,
    weights_plan,
)
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.autoencoders import Autoencoder, begins_with_a_picture, unused_parts
from tetrion.engine.models.dummy import module_shapes
from tetrion.engine.models.encoders import ProjectedClipEncoder, T5Encoder, one_thread
from tetrion.engine.models.family import Attend, Constant, Model, Tokens
from tetrion.engine.models.layers import Embedder, Sum, linear_of, normed, take, timestep_embedding
from tetrion.engine.models.loading import Component, component_tensors
from tetrion.engine.models.ops import Linear, Ops
from tetrion.engine.models.sources import component_files, whole
from tetrion.engine.parallel.exchange import Stream
from tetrion.engine.params import Params
from tetrion.engine.sampling.flow_match import Schedule, euler_schedule
from tetrion.engine.shape import StepShape

TEXT, IMAGE = 0, 1
"""Segments, in canonical order."""
ENCODING = ("text_in.",)
"""See `models.family.FamilyModule`."""


def transformer_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that `transformer/config.json` means, by their names in a diffusers checkpoint."""
    config = json.loads((folder / "config.json").read_bytes())
    return module_shapes(functools.partial(SD3Transformer2DModel.from_config, config))


@dataclass(frozen=True, slots=True)
class Projection:
    """Into an attention. `qkv`: [3·C, C]. q and k are normed by head if there are weights for that, [D]."""

    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None

    def stream(self, ops: Ops, x: Tensor, segment: int) -> Stream:
        return Stream(ops.linear(x, self.qkv), (segment,), self.q_norm, self.k_norm, has_rope=False)


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a stream does with its rows of attention: out of it, then its MLP."""

    out: Linear
    mlp_in: Linear
    mlp_out: Linear


@dataclass(frozen=True, slots=True)
class Second:
    """Attention over the image alone."""

    projection: Projection
    out: Linear


@dataclass(frozen=True, slots=True)
class Block:
    """The last block's text is only looked at."""

    text_in: Projection
    image_in: Projection
    text: Outputs | None
    image: Outputs
    second: Second | None


@dataclass(frozen=True, slots=True)
class SD3Weights:
    """All of the transformer. `positions`: [side, side, C] of the largest picture. `modulation` computes every block's
    vectors from one conditioning vector: [V·C, C]."""

    image_in: Linear
    positions: Tensor
    text_in: Linear
    time_in: Embedder
    pooled_in: Embedder
    modulation: Linear
    blocks: tuple[Block, ...]
    final: Linear


def build_weights(config: SD3Config, tensors: Mapping[str, Tensor]) -> SD3Weights:
    """Arrange tensors named as in `weights_plan`. No copies."""
    layer = functools.partial(linear_of, tensors)

    def projection(name: str) -> Projection:
        return Projection(layer(f"{name}.qkv"), tensors.get(f"{name}.q_norm"), tensors.get(f"{name}.k_norm"))

    def outputs(name: str) -> Outputs:
        return Outputs(layer(f"{name}.out"), layer(f"{name}.mlp_in"), layer(f"{name}.mlp_out"))

    def block(i: int) -> Block:
        name = f"block.{i}"
        has_second = i in config.dual_attention_layers
        return Block(
            text_in=projection(f"{name}.text_in"),
            image_in=projection(f"{name}.image_in"),
            text=None if config.is_last(i) else outputs(f"{name}.text"),
            image=outputs(f"{name}.image"),
            second=Second(projection(f"{name}.second"), layer(f"{name}.second.out")) if has_second else None,
        )

    return SD3Weights(
        image_in=layer("image_in"),
        positions=tensors["positions"],
        text_in=layer("text_in"),
        time_in=Embedder.of(tensors, "time_in"),
        pooled_in=Embedder.of(tensors, "pooled_in"),
        modulation=layer("modulation"),
        blocks=tuple(block(i) for i in range(config.num_layers)),
        final=layer("final"),
    )


def modulations(ops: Ops, weights: SD3Weights, timesteps: Tensor, pooled: Tensor) -> Tensor:
    """Every block's shift, scale and gate vectors for all steps of a branch: [S, V, C].

    timesteps: [S] fp32, as the scheduler gives them (0 … 1000); pooled: [pooled_dim].
    """
    conditioning = weights.time_in(ops, timestep_embedding(timesteps).to(pooled.dtype))
    conditioning = conditioning + weights.pooled_in(ops, pooled.unsqueeze(0))
    hidden_size = conditioning.shape[-1]
    return ops.linear(ops.silu(conditioning), weights.modulation).view(len(timesteps), -1, hidden_size)


def positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """The middle of the table [side, side, C] for a picture of rows × columns tokens: [rows · columns, C]."""
    top, left = (table.shape[0] - rows) // 2, (table.shape[1] - columns) // 2
    return table[top : top + rows, left : left + columns].flatten(0, 1)


def project_text(ops: Ops, weights: SD3Weights, prompt_embeds: Tensor) -> Tensor:
    """Prompt embeddings [n_txt, text_dim] -> text rows [n_txt, C]. The same for all steps of a request."""
    return ops.linear(prompt_embeds, weights.text_in)


def step(
    ops: Ops,
    weights: SD3Weights,
    latents: Tensor,
    text: Tensor,
    positions: Tensor,
    vectors: Tensor,
    attend: Attend,
) -> Tensor:
    """Velocity [n_img, token width] at one step, for this member's rows.

    latents: [n_img, token width]; text: [n_txt, C] from `project_text`; positions: [n_img, C]; vectors: all of
    `modulations`, of which `ops` knows the step.
    """
    rows = iter(vectors.unbind(-2))
    streams = [Sum(text), Sum(ops.linear(latents, weights.image_in) + positions)]
    for block in weights.blocks:
        of_text = take(rows, VECTORS_AT_END if block.text is None else VECTORS)
        of_image = take(rows, VECTORS if block.second is None else VECTORS_DUAL)
        streams = _block(ops, block, streams, of_text, of_image, attend)
    scale, shift = take(rows, VECTORS_AT_END)
    ((_, modulated),) = ops.residual_modulate([streams[-1].branch(shift, scale)])
    return ops.narrow_linear(modulated, weights.final)


def _block(
    ops: Ops,
    block: Block,
    streams: Sequence[Sum],
    of_text: Sequence[Tensor],
    of_image: Sequence[Tensor],
    attend: Attend,
) -> list[Sum]:
    """`streams`: text's and image's; the last block gives the image's alone."""
    text_shift_scale = (of_text[0], of_text[1]) if block.text is not None else (of_text[1], of_text[0])
    (text, image), (text_in, image_in) = normed(ops, streams, [text_shift_scale, (of_image[0], of_image[1])])
    projected = [block.text_in.stream(ops, text_in, TEXT), block.image_in.stream(ops, image_in, IMAGE)]
    of_attention = attend(projected).split([len(text), len(image)])
    sums = [Sum(image, of_image[2], ops.linear(of_attention[IMAGE], block.image.out))]
    if block.text is not None:
        sums.insert(0, Sum(text, of_text[2], ops.linear(of_attention[TEXT], block.text.out)))
    if block.second is not None:
        sums[-1] = _second_attention(ops, block.second, image, sums[-1], of_image[VECTORS:], attend)
    layers = [block.image] if block.text is None else [block.text, block.image]
    vectors = [of_image] if block.text is None else [of_text, of_image]
    xs, modulated = normed(ops, sums, [(v[3], v[4]) for v in vectors])
    outs = [
        ops.linear(ops.gelu_linear(n, layer.mlp_in), layer.mlp_out) for n, layer in zip(modulated, layers, strict=True)
    ]
    return [Sum(x, v[5], out) for x, v, out in zip(xs, vectors, outs, strict=True)]


def _second_attention(
    ops: Ops, second: Second, image: Tensor, first: Sum, vectors: Sequence[Tensor], attend: Attend
) -> Sum:
    """It looks at the image as it was before the first attention, whose result is `first`."""
    shift, scale, gate = vectors
    _, (modulated,) = normed(ops, [Sum(image)], [(shift, scale)])
    out = ops.linear(attend([second.projection.stream(ops, modulated, IMAGE)]), second.out)
    assert first.gate is not None and first.y is not None
    return Sum(ops.gated_sum(first.x, first.gate, first.y), gate, out)


class SD3Transformer:
    """The network of `models.family.Network`: config, weights and operators together."""

    def __init__(self, config: SD3Config, tensors: Mapping[str, Tensor], ops: Ops, size_multiple: int) -> None:
        """`size_multiple`: pixels of an image token's side."""
        self.config, self._unit = config, size_multiple
        self.weights = build_weights(config, tensors)
        self.ops = ops
        self.num_vectors, self.hidden_size = config.num_vectors, config.hidden_size
        self.out_channels = config.token_width

    def vectors(self, fields: Mapping[str, Tensor], times: Tensor, params: Params) -> Tensor:
        return modulations(self.ops, self.weights, times, fields["pooled"][0])

    def constants(self, fields: Mapping[str, Tensor], shape: StepShape, branch: int) -> Mapping[str, Constant]:
        rows, columns = shape.height // self._unit, shape.width // self._unit
        return {
            "text": Constant(fields["text"][: shape.text[branch]], TEXT),
            "positions": Constant(positions(self.weights.positions, rows, columns), IMAGE),
        }

    def rope(self, shape: StepShape, branch: int) -> None:
        return None

    def step(self, latents: Tensor, constants: Mapping[str, Tensor], vectors: Tensor, attend: Attend) -> Tensor:
        return step(self.ops, self.weights, latents, constants["text"], constants["positions"], vectors, attend)


class SD3Text:
    """Rows of both CLIPs side by side, filled up with zeros to the transformer's text width, T5's rows below them, all
    projected to what the blocks take; both CLIPs' pooled vectors side by side. Without a T5 its rows are zeros."""

    def __init__(
        self, clips: Sequence[ProjectedClipEncoder], t5: T5Encoder | None, num_t5_rows: int, network: SD3Transformer
    ) -> None:
        self._clips, self._t5, self._num_t5_rows, self._network = clips, t5, num_t5_rows, network

    def tokens(self, prompt: str) -> Tokens:
        ids = [clip.ids(prompt) for clip in self._clips]
        if self._t5 is None:
            return Tokens(tuple(ids), self._clips[0].num_tokens(prompt))
        return Tokens((*ids, self._t5.ids(prompt)), self._t5.num_tokens(prompt))

    @torch.no_grad()
    def embed(self, ids: Sequence[Tensor]) -> dict[str, Tensor]:
        width = self._network.config.joint_attention_dim
        with one_thread():
            of_clips = [clip.rows_and_projected(own) for clip, own in zip(self._clips, ids, strict=False)]
            clip_rows = torch.cat([rows for rows, _ in of_clips], dim=1)
            clip_rows = F.pad(clip_rows, (0, width - clip_rows.shape[1]))
            zeros = clip_rows.new_zeros(self._num_t5_rows, width)
            t5_rows = zeros if self._t5 is None else self._t5.rows(ids[-1])
        text = project_text(self._network.ops, self._network.weights, torch.cat([clip_rows, t5_rows]))
        return {"text": text, "pooled": torch.cat([pooled for _, pooled in of_clips]).unsqueeze(0)}


CLIPS = ("text_encoder", "text_encoder_2")
T5 = "text_encoder_3"


def components(spec: ModelSpec, load_format: LoadFormat) -> dict[str, Component]:
    path = Path(spec.path)
    config = read_config(component_folder(path, "transformer") / "config.json")
    shapes = dict.fromkeys(CLIPS, ProjectedClipEncoder.shapes)
    if has_t5(path):
        shapes[T5] = T5Encoder.shapes
    shapes |= {"vae": Autoencoder.shapes, "transformer": transformer_shapes}
    files = component_files(path, load_format, shapes)
    encoders = {name: whole(files[name]) for name in files if name in (*CLIPS, T5)}
    return encoders | {
        "vae": whole(files["vae"], without=unused_parts(spec)),
        "transformer": Component(files["transformer"], weights_plan(config)),
    }


def network(spec: ModelSpec, tensors: Mapping[str, Tensor], ops: Ops) -> SD3Transformer:
    config = read_config(component_folder(Path(spec.path), "transformer") / "config.json")
    return SD3Transformer(config, tensors, ops, spec.sizes.multiple)


def build(spec: ModelSpec, load_format: LoadFormat, tensors: Mapping[str, Tensor], ops: Ops) -> Model:
    path = Path(spec.path)
    transformer = network(spec, component_tensors(tensors, "transformer"), ops)
    codec = Autoencoder(component_folder(path, "vae"), component_tensors(tensors, "vae"), spec)

    def schedule(num_steps: int, shape: StepShape) -> Schedule:
        return euler_schedule(spec.scheduler, num_steps, shape.image, "trained")

    return Model(
        spec=spec,
        network=transformer,
        text=_text(path, load_format, tensors, transformer, spec.max_rows("text")),
        codec=codec,
        begin=begins_with_a_picture(codec, schedule),
        schedule=schedule,
        guidance_factor=lambda params: params.guidance,
    )


def _text(
    path: Path, load_format: LoadFormat, tensors: Mapping[str, Tensor], network: SD3Transformer, num_rows: int
) -> SD3Text:
    """`num_rows`: of both CLIPs and of T5 together."""
    clips = [
        ProjectedClipEncoder(
            component_folder(path, name),
            component_folder(path, name.replace("text_encoder", "tokenizer")),
            component_tensors(tensors, name),
            load_format,
        )
        for name in CLIPS
    ]
    t5, num_t5_rows = None, num_rows - clips[0].num_ids
    if has_t5(path):
        t5 = T5Encoder(
            component_folder(path, T5),
            component_folder(path, "tokenizer_3"),
            component_tensors(tensors, T5),
            load_format,
            num_t5_rows,
        )
    return SD3Text(clips, t5, num_t5_rows, network)
