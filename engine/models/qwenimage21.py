"""Qwen-Image-2.1's transformer on one member's rows of a picture: single-stream blocks whose attention is causal by
blocks. A text's rows attend to those before them and are modulated as of time 0, so that their keys and values are the
same in all steps; a step works on the picture's rows, which attend to those and to each other.

Owns the forward pass, modulations, rotary tables, how prompts become text rows and these keys and values. Knows nothing
of devices, groups or requests: the operators, and attention over the whole picture, are arguments.
Source: diffusers' QwenImage21Transformer2DModel and QwenImage21Pipeline, whose results it reproduces.

Keys and values of texts are made of the text's final rows by every member itself, once a request and in one way, so
that bits depend on nothing that may or may not have been kept. They are too large for a slot: 0.5 MB a row.

Shapes: n rows of this member, C hidden size, S steps, V modulation vectors, B blocks, T rows of text.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_qwenimage21 import AutoencoderKLQwenImage21
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21Transformer2DModel
from torch import Tensor

from tetrion.engine.config import LoadFormat
from tetrion.engine.families.checkpoint import component_folder
from tetrion.engine.families.components import read_qwen3_vl
from tetrion.engine.families.qwen_image21_vae import QwenImage21VaeConfig
from tetrion.engine.families.qwenimage21 import (
    EMPTY,
    EPSILON,
    NUM_VECTORS,
    THETA,
    QwenImage21Config,
    prompt_reader,
    read_config,
    read_levels,
    weights_plan,
)
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.autoencoders import Autoencoder, begins_with_noise, unused_parts
from tetrion.engine.models.dummy import module_shapes
from tetrion.engine.models.encoders import one_thread
from tetrion.engine.models.family import PREFIX, Attend, Constant, Model, Tokens
from tetrion.engine.models.language_encoders import QWEN3_VL, LanguageEncoder, language_component, language_shapes_of
from tetrion.engine.models.layers import Embedder, StreamBlock, Sum, linear_of, normed, time_conditioning
from tetrion.engine.models.loading import Component, component_tensors
from tetrion.engine.models.ops import Linear, Ops
from tetrion.engine.models.sources import component_files, whole
from tetrion.engine.parallel.exchange import Rope, Stream
from tetrion.engine.params import Params
from tetrion.engine.sampling.flow_match import Schedule, euler_schedule
from tetrion.engine.shape import StepShape
from tetrion.kernels import reference

IMAGE = 0
"""The segment that is stepped; text follows it in canonical order."""
ENCODING = ("text_norm", "text_in.")
"""See `models.family.FamilyModule`."""


def transformer_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that `transformer/config.json` means, by their names in a diffusers checkpoint."""
    config = json.loads((folder / "config.json").read_bytes())
    return module_shapes(functools.partial(QwenImage21Transformer2DModel.from_config, config))


@dataclass(frozen=True, slots=True)
class QwenImage21Weights:
    """All of the transformer. `text_norm`: what is added to 1. `modulation`: [4·C, C]."""

    image_in: Linear
    text_norm: Tensor
    text_in: Linear
    text_out: Linear
    time_in: Embedder
    modulation: Linear
    final_scale: Linear
    blocks: tuple[StreamBlock, ...]
    final: Linear


def build_weights(config: QwenImage21Config, tensors: Mapping[str, Tensor]) -> QwenImage21Weights:
    """Arrange tensors named as in `weights_plan`. No copies."""
    layer = functools.partial(linear_of, tensors)
    return QwenImage21Weights(
        image_in=layer("image_in"),
        text_norm=tensors["text_norm"],
        text_in=layer("text_in.in_layer"),
        text_out=layer("text_in.out_layer"),
        time_in=Embedder.of(tensors, "time_in"),
        modulation=layer("modulation"),
        final_scale=layer("final_scale"),
        blocks=tuple(StreamBlock.of(tensors, f"block.{i}") for i in range(config.num_layers)),
        final=layer("final"),
    )


def modulations(ops: Ops, weights: QwenImage21Weights, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
    """All blocks' scales and gates for all steps of a request: [S, V, C].

    timesteps: [S] fp32, as the scheduler gives them (0 … 1000).
    """
    time = ops.silu(time_conditioning(ops, weights.time_in, None, timesteps, 0.0, dtype))
    scale, gate, mlp_scale, mlp_gate = ops.linear(time, weights.modulation).chunk(4, dim=1)
    gate, mlp_gate = (raw.float().tanh().to(dtype) for raw in (gate, mlp_gate))
    final = ops.linear(time, weights.final_scale)
    return torch.stack([torch.zeros_like(scale), scale, gate, mlp_scale, mlp_gate, final], dim=1)


def rope(config: QwenImage21Config, rows: int, columns: int, num_text: int) -> Rope:
    """Rotary tables of a whole sequence: cos, sin [rows · columns + num_text, head_dim / 2]; sizes in tokens.

    Positions are (i, i, i) for text and (T, row, column) for the picture behind it, whose rows and columns are counted
    from its middle. Angles are products in fp32, as diffusers has them.
    """
    image = torch.empty(rows * columns, 3)
    image[:, 0] = num_text
    image[:, 1:] = torch.cartesian_prod(_centred(rows), _centred(columns)).view(-1, 2)
    text = torch.arange(num_text, dtype=torch.float32).unsqueeze(1).expand(-1, 3)
    return _turns(config, torch.cat([image, text]))


def _centred(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float32) - (count - count // 2)


def _turns(config: QwenImage21Config, positions: Tensor) -> Rope:
    """cos, sin [n, head_dim / 2] of positions fp32 [n, 3]."""
    angles = torch.cat(
        [
            torch.outer(positions[:, i], 1.0 / torch.pow(THETA, torch.arange(0, dim, 2, dtype=torch.float32) / dim))
            for i, dim in enumerate(config.axes_dims_rope)
        ],
        dim=1,
    )
    return angles.cos(), angles.sin()


def step(
    ops: Ops, weights: QwenImage21Weights, latents: Tensor, prefix: Tensor, table: Tensor, attend: Attend
) -> Tensor:
    """Velocity [n, in_channels] at one step, for this member's rows.

    latents: [n, in_channels]; prefix: keys and values of the text, [T, B, 2, own heads, D]; table: all of
    `modulations`, of which `ops` knows the step.
    """
    no_shift, scale, gate, mlp_scale, mlp_gate, final = table.unbind(-2)
    image = Sum(ops.linear(latents, weights.image_in))
    for i, block in enumerate(weights.blocks):
        (x,), (modulated,) = normed(ops, [image], [(no_shift, scale)])
        keys, values = prefix[:, i].unbind(1)
        qkv = ops.linear(modulated, block.qkv)
        stream = Stream(qkv, (IMAGE,), block.q_norm, block.k_norm, epsilon=EPSILON, prefix=(keys, values))
        attended = ops.linear(attend([stream]), block.out)
        (x,), (modulated,) = normed(ops, [Sum(x, gate, attended)], [(no_shift, mlp_scale)])
        image = Sum(x, mlp_gate, ops.linear(ops.gated_linear(modulated, block.mlp_in), block.mlp_out))
    _, (modulated,) = normed(ops, [image], [(no_shift, final)])
    return ops.narrow_linear(modulated, weights.final)


class QwenImage21Transformer:
    """The network of `models.family.Network`: config, weights and operators together."""

    def __init__(self, config: QwenImage21Config, tensors: Mapping[str, Tensor], ops: Ops, spec: ModelSpec) -> None:
        self.config, self._sizes = config, spec.sizes
        self.weights = build_weights(config, tensors)
        self.ops = ops
        self.num_vectors, self.hidden_size, self.out_channels = NUM_VECTORS, config.hidden_size, config.in_channels

    def vectors(self, fields: Mapping[str, Tensor], times: Tensor, params: Params) -> Tensor:
        return modulations(self.ops, self.weights, times, fields["text"].dtype)

    def constants(self, fields: Mapping[str, Tensor], shape: StepShape, branch: int) -> Mapping[str, Constant]:
        return {}

    def rope(self, shape: StepShape, branch: int) -> Rope:
        rows, columns = (2 * (side // self._sizes.multiple) for side in (shape.height, shape.width))
        return rope(self.config, rows, columns, shape.text[branch])

    def step(self, latents: Tensor, constants: Mapping[str, Tensor], vectors: Tensor, attend: Attend) -> Tensor:
        return step(self.ops, self.weights, latents, constants[PREFIX], vectors, attend)


class QwenImage21Text:
    """Rows of a language model's last layer, projected; keys and values that a step needs of them."""

    def __init__(self, encoder: LanguageEncoder, network: QwenImage21Transformer, num_dropped: int) -> None:
        self._encoder, self._network, self._num_dropped = encoder, network, num_dropped

    def tokens(self, prompt: str) -> Tokens:
        ids, is_own, num_tokens = self._encoder.ids(prompt or EMPTY)
        return Tokens((ids, is_own), num_tokens)

    @torch.no_grad()
    def embed(self, ids: Sequence[Tensor]) -> dict[str, Tensor]:
        """As many rows as there can be, of which a prompt's own come first."""
        weights = self._network.weights
        with one_thread():
            rows = self._encoder.rows(*ids)[self._num_dropped :]
            normed_rows = reference.rms_norm(rows.float(), EPSILON, weights.text_norm.float() + 1).to(rows.dtype)
            inner = reference.gelu_tanh(reference.linear(normed_rows, weights.text_in.weight))
            return {"text": reference.linear(inner, weights.text_out.weight)}

    @torch.no_grad()
    def prefix(self, fields: Mapping[str, Tensor], shape: StepShape, branch: int) -> Tensor:
        """See `Model.prefix`."""
        config, weights = self._network.config, self._network.weights
        x = fields["text"][: shape.text[branch]]
        turns = self._turns(len(x), x.device)
        _, scale, gate, mlp_scale, mlp_gate, _ = self._vectors_at_0.to(x.dtype).unbind(0)
        no_shift, heads = torch.zeros_like(scale), (config.num_attention_heads, config.attention_head_dim)
        result = x.new_empty(len(x), config.num_layers, 2, *heads)
        for i, block in enumerate(weights.blocks):
            qkv = reference.linear(reference.modulate(x, no_shift, scale), block.qkv.weight)
            q, k, v = self._qkv(qkv, block, turns)
            result[:, i, 0], result[:, i, 1] = k, v
            if i == config.num_layers - 1:
                break
            q_1HTD, k_1HTD, v_1HTD = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))
            attended = F.scaled_dot_product_attention(q_1HTD, k_1HTD, v_1HTD, is_causal=True)[0]
            out = reference.linear(attended.transpose(0, 1).flatten(1), block.out.weight)
            x = reference.gated_residual(x, gate, out)
            inner = reference.linear(reference.modulate(x, no_shift, mlp_scale), block.mlp_in.weight)
            out = reference.linear(reference.silu_product(inner), block.mlp_out.weight)
            x = reference.gated_residual(x, mlp_gate, out)
        return result

    def _qkv(self, qkv: Tensor, block: StreamBlock, turns: Rope) -> tuple[Tensor, ...]:
        """[T, H, D] each."""
        heads_fp32 = qkv.float().unflatten(1, (3, self._network.config.num_attention_heads, -1))
        norms = block.q_norm.float(), block.k_norm.float()
        return tuple(part.to(qkv.dtype) for part in reference.qk_norm_rope(heads_fp32, *norms, turns, EPSILON))

    def _turns(self, num_text: int, device: torch.device) -> Rope:
        """Of the text's rows, each value twice."""
        cos, sin = rope(self._network.config, 0, 0, num_text)
        return cos.repeat_interleave(2, dim=1).to(device), sin.repeat_interleave(2, dim=1).to(device)

    @functools.cached_property
    def _vectors_at_0(self) -> Tensor:
        """[V, C]."""
        weights = self._network.weights
        times = torch.zeros(1, device=weights.text_norm.device)
        return modulations(self._network.ops, weights, times, weights.text_norm.dtype)[0]


class QwenImage21Codec(Autoencoder):
    """Latents are scaled channel by channel; a token is a latent pixel. What is transparent of a picture is white."""

    KIND = AutoencoderKLQwenImage21
    CONFIG = QwenImage21VaeConfig
    _mean: Tensor
    _deviation: Tensor

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
        super().__init__(folder, tensors, spec)
        self._mean, self._deviation = self._mean.to(self._device), self._deviation.to(self._device)

    def fuse(self) -> None:
        """Its norms are of another kind than those that have a kernel."""

    def noise(self, seed: int, shape: StepShape) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        size = (self._num_channels, *self._latent_size(shape.size))
        return torch.randn(size, generator=generator, dtype=torch.float32).flatten(1).T.contiguous()

    def _read_scaling(self, config: QwenImage21VaeConfig) -> None:
        self._mean, self._deviation = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)

    def _decodable(self, latents: Tensor, rows: int, columns: int) -> Tensor:
        return (latents * self._deviation + self._mean).T.unflatten(1, (2 * rows, 2 * columns))

    @staticmethod
    def _batched(map_CHW: Tensor) -> Tensor:
        return map_CHW[None, :, None]

    @staticmethod
    def _single(maps: Tensor) -> Tensor:
        return maps[0, :, 0]


def schedule(spec: ModelSpec, num_steps: int, shape: StepShape) -> Schedule:
    levels = read_levels(Path(spec.path))
    spacing: Any = levels if levels is not None and len(levels) == num_steps else "even"
    return euler_schedule(spec.scheduler, num_steps, shape.image, spacing)


def components(spec: ModelSpec, load_format: LoadFormat) -> dict[str, Component]:
    path = Path(spec.path)
    config = read_config(component_folder(path, "transformer") / "config.json")
    encoder, num_layers = _encoder(spec)
    files = component_files(
        path,
        load_format,
        {
            "text_encoder": language_shapes_of(QWEN3_VL, num_layers),
            "vae": QwenImage21Codec.shapes,
            "transformer": transformer_shapes,
        },
    )
    return {
        "text_encoder": language_component(QWEN3_VL, encoder, files["text_encoder"], num_layers),
        "vae": whole(files["vae"], without=unused_parts(spec)),
        "transformer": Component(files["transformer"], weights_plan(config)),
    }


def network(spec: ModelSpec, tensors: Mapping[str, Tensor], ops: Ops) -> QwenImage21Transformer:
    config = read_config(component_folder(Path(spec.path), "transformer") / "config.json")
    return QwenImage21Transformer(config, tensors, ops, spec)


def build(spec: ModelSpec, load_format: LoadFormat, tensors: Mapping[str, Tensor], ops: Ops) -> Model:
    path = Path(spec.path)
    transformer = network(spec, component_tensors(tensors, "transformer"), ops)
    folder, num_layers = _encoder(spec)
    own, reader = component_tensors(tensors, "text_encoder"), prompt_reader(path)
    text = QwenImage21Text(
        LanguageEncoder(QWEN3_VL, folder, own, [num_layers], reader), transformer, reader.num_dropped
    )
    codec = QwenImage21Codec(component_folder(path, "vae"), component_tensors(tensors, "vae"), spec)
    return Model(
        spec=spec,
        network=transformer,
        text=text,
        codec=codec,
        begin=begins_with_noise(codec),
        schedule=functools.partial(schedule, spec),
        guidance_factor=lambda params: params.guidance,
        prefix=text.prefix,
    )


def _encoder(spec: ModelSpec) -> tuple[Path, int]:
    """The text encoder's folder, and how many layers it has."""
    folder = component_folder(Path(spec.path), "text_encoder")
    return folder, read_qwen3_vl(folder, 1, spec.max_text_tokens).num_hidden_layers
