"""Krea 2's transformer (single-stream blocks over text and picture) on one member's rows of a sequence. Attention has
fewer heads of keys and values than of queries, and a gate on its output; blocks share one projection of the time, to
which each adds vectors of its own.

Owns the forward pass, modulations, rotary tables, how prompts become text rows. Knows nothing of devices, groups or
requests: the operators, and attention over the whole sequence, are arguments.
Source: diffusers' Krea2Transformer2DModel and Krea2Pipeline, whose results it reproduces.

The network that makes one text of a language model's layers knows neither step nor picture: it is run where a prompt is
encoded. Norms' weights are kept as what a norm multiplies by, less 1; those of the blocks are part of the table.

Shapes: n rows of this member, C hidden size, S steps, V modulation vectors, L rows of text, W their width.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_krea2 import Krea2Transformer2DModel
from torch import Tensor

from tetrion.engine.config import LoadFormat
from tetrion.engine.families.checkpoint import component_folder
from tetrion.engine.families.krea2 import (
    NUM_DROPPED,
    TURBO_SHIFT,
    VECTORS,
    VECTORS_AT_END,
    Krea2Config,
    layers,
    prompt_reader,
    read_config,
    read_index,
    weights_plan,
)
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.autoencoders import begins_with_noise
from tetrion.engine.models.dummy import module_shapes
from tetrion.engine.models.encoders import one_thread
from tetrion.engine.models.family import Attend, Constant, Model, Tokens
from tetrion.engine.models.language_encoders import (
    QWEN3_VL,
    LanguageEncoder,
    language_component,
    language_shapes_of,
)
from tetrion.engine.models.layers import Embedder, Sum, linear_of, rotary_angles, take, timestep_embedding
from tetrion.engine.models.loading import Component, component_tensors
from tetrion.engine.models.ops import Linear, Ops
from tetrion.engine.models.qwen_image_vae import QwenImageCodec
from tetrion.engine.models.sources import component_files
from tetrion.engine.parallel.exchange import Rope, Stream
from tetrion.engine.params import Params
from tetrion.engine.sampling.flow_match import Schedule, euler_schedule
from tetrion.engine.shape import StepShape
from tetrion.kernels import reference

TEXT, IMAGE = 0, 1
"""Segments, in canonical order."""
ENCODING = ("text_",)
"""What a prompt's rows are made with: what puts layers together, refines and projects them."""


def transformer_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that `transformer/config.json` means, by their names in a diffusers checkpoint."""
    config = json.loads((folder / "config.json").read_bytes())
    return module_shapes(functools.partial(Krea2Transformer2DModel.from_config, config))


@dataclass(frozen=True, slots=True)
class Block:
    """`qkv_gate`: [(2·H + 2·K)·D, C], the output's gate last; `mlp_in`: [2·F, C], of a gated MLP. `q_norm`, `k_norm`:
    what norms multiply by, fp32; `norms`: that less 1, before attention and before the MLP."""

    qkv_gate: Linear
    q_norm: Tensor
    k_norm: Tensor
    out: Linear
    mlp_in: Linear
    mlp_out: Linear
    norms: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], name: str) -> "Block":
        qkv_gate, out, mlp_in, mlp_out = (
            linear_of(tensors, f"{name}.{layer}") for layer in ("qkv_gate", "out", "mlp_in", "mlp_out")
        )
        q_norm, k_norm = (_factor(tensors[f"{name}.{x}_norm"]) for x in "qk")
        return cls(qkv_gate, q_norm, k_norm, out, mlp_in, mlp_out, (tensors[f"{name}.norm1"], tensors[f"{name}.norm2"]))


@dataclass(frozen=True, slots=True)
class Krea2Weights:
    """All of the transformer. `modulation` computes what all blocks' vectors have in common: [6·C, C]; `own_vectors`:
    what each adds, [6, C]. `projector`: [1, layers]."""

    image_in: Linear
    time_in: Embedder
    modulation: Linear
    layerwise: tuple[Block, ...]
    projector: Tensor
    refiners: tuple[Block, ...]
    text_norm: Tensor
    text_in: Embedder
    blocks: tuple[Block, ...]
    own_vectors: tuple[Tensor, ...]
    final_vectors: Tensor
    final_norm: Tensor
    final: Linear


def build_weights(config: Krea2Config, tensors: Mapping[str, Tensor]) -> Krea2Weights:
    """Arrange tensors named as in `weights_plan`. Copies norms over heads alone."""
    text_blocks = tuple(Block.of(tensors, name) for name in config.text_blocks)
    names = [f"transformer_blocks.{i}" for i in range(config.num_layers)]
    return Krea2Weights(
        image_in=linear_of(tensors, "image_in"),
        time_in=Embedder.of(tensors, "time_in"),
        modulation=linear_of(tensors, "modulation"),
        layerwise=text_blocks[: config.num_layerwise_text_blocks],
        projector=tensors["text_fusion.projector"],
        refiners=text_blocks[config.num_layerwise_text_blocks :],
        text_norm=tensors["text_norm"],
        text_in=Embedder.of(tensors, "text_in"),
        blocks=tuple(Block.of(tensors, name) for name in names),
        own_vectors=tuple(tensors[f"{name}.vectors"] for name in names),
        final_vectors=tensors["final.vectors"],
        final_norm=tensors["final.norm"],
        final=linear_of(tensors, "final"),
    )


def _factor(weight: Tensor) -> Tensor:
    """What a norm multiplies by, fp32."""
    return 1 + weight.float()


def modulations(ops: Ops, weights: Krea2Weights, times: Tensor, dtype: torch.dtype) -> Tensor:
    """Every block's scales, shifts and gates for all steps of a request, with its norms' weights in them: [S, V, C].

    times: [S] fp32, noise levels in 0 … 1.
    """
    time_in = weights.time_in
    embedded = ops.gelu_linear(timestep_embedding(times * 1000).to(dtype), time_in.in_layer)
    time = ops.linear(embedded, time_in.out_layer)
    shared = ops.linear(reference.gelu_tanh(time), weights.modulation).unflatten(1, (VECTORS, -1)).float()
    tables = []
    for block, own in zip(weights.blocks, weights.own_vectors, strict=True):
        scale, shift, gate, mlp_scale, mlp_shift, mlp_gate = (shared + own.float()).unbind(1)
        before, before_mlp = block.norms
        tables += [_folded(scale, before), shift, gate, _folded(mlp_scale, before_mlp), mlp_shift, mlp_gate]
    scale, shift = (time.unsqueeze(1).float() + weights.final_vectors.float()).unbind(1)
    tables += [_folded(scale, weights.final_norm), shift]
    return torch.stack(tables, dim=1).to(dtype)


def _folded(scale: Tensor, norm: Tensor) -> Tensor:
    """A scale and a norm's weight, both less 1, as one, less 1."""
    return scale + norm.float() + scale * norm.float()


def rope(config: Krea2Config, rows: int, columns: int, num_text: int) -> Rope:
    """Rotary tables of a whole sequence: cos, sin [num_text + rows · columns, head_dim / 2]; sizes in tokens. Text is
    at the origin, the picture at (0, row, column)."""
    positions = torch.zeros(num_text + rows * columns, 3)
    positions[num_text:, 1:] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2)
    angles = rotary_angles(positions, config.axes_dims_rope, config.rope_theta)
    return angles.cos().float(), angles.sin().float()


def step(
    ops: Ops,
    config: Krea2Config,
    weights: Krea2Weights,
    latents: Tensor,
    text: Tensor,
    table: Tensor,
    attend: Attend,
) -> Tensor:
    """Velocity [n_img, in_channels] at one step, for this member's rows.

    latents: [n_img, in_channels]; text: [n_txt, C], projected; table: all of `modulations`, of which `ops` knows the
    step.
    """
    vectors, epsilon = iter(table.unbind(-2)), config.norm_eps
    total = Sum(torch.cat([text, ops.linear(latents, weights.image_in)]))
    for block in weights.blocks:
        scale, shift, gate, mlp_scale, mlp_shift, mlp_gate = take(vectors, VECTORS)
        ((x, modulated),) = ops.residual_modulate([total.branch(shift, scale)], rms_epsilon=epsilon)
        out = ops.linear(_attended(ops, block, modulated, attend, epsilon), block.out)
        ((x, modulated),) = ops.residual_modulate([Sum(x, gate, out).branch(mlp_shift, mlp_scale)], rms_epsilon=epsilon)
        total = Sum(x, mlp_gate, ops.linear(ops.gated_linear(modulated, block.mlp_in), block.mlp_out))
    scale, shift = take(vectors, VECTORS_AT_END)
    image = total.rows(len(text), len(text) + len(latents))
    ((_, modulated),) = ops.residual_modulate([image.branch(shift, scale)], rms_epsilon=epsilon)
    return ops.narrow_linear(modulated, weights.final)


def _attended(ops: Ops, block: Block, x: Tensor, attend: Attend, epsilon: float) -> Tensor:
    """Attention's output, gated: [n, C]."""
    qkv_gate = ops.linear(x, block.qkv_gate)
    width = x.shape[1]
    qkv, gate = qkv_gate[:, :-width], qkv_gate[:, -width:]
    return ops.sigmoid_product(attend([Stream(qkv, (TEXT, IMAGE), block.q_norm, block.k_norm, epsilon=epsilon)]), gate)


class Krea2Transformer:
    """The network of `models.family.Network`: config, weights and operators together."""

    def __init__(self, config: Krea2Config, tensors: Mapping[str, Tensor], ops: Ops, spec: ModelSpec) -> None:
        self.config, self._spec = config, spec
        self.weights = build_weights(config, tensors)
        self.ops = ops
        self.num_vectors, self.hidden_size = config.num_vectors, config.hidden_size
        self.out_channels = config.in_channels

    def vectors(self, fields: Mapping[str, Tensor], times: Tensor, params: Params) -> Tensor:
        levels = times / self._spec.scheduler.num_train_timesteps
        return modulations(self.ops, self.weights, levels, fields["text"].dtype)

    def constants(self, fields: Mapping[str, Tensor], shape: StepShape, branch: int) -> Mapping[str, Constant]:
        return {"text": Constant(fields["text"][: shape.text[branch]], TEXT)}

    def rope(self, shape: StepShape, branch: int) -> Rope:
        unit = self._spec.sizes.multiple
        return rope(self.config, shape.height // unit, shape.width // unit, shape.text[branch])

    def step(self, latents: Tensor, constants: Mapping[str, Tensor], vectors: Tensor, attend: Attend) -> Tensor:
        return step(self.ops, self.config, self.weights, latents, constants["text"], vectors, attend)


class Krea2Text:
    """Rows of some of a language model's layers behind the form's first tokens: put together layer by layer for each
    token, then refined over tokens, then projected."""

    def __init__(self, encoder: LanguageEncoder, network: Krea2Transformer) -> None:
        self._encoder, self._config, self._weights = encoder, network.config, network.weights

    def tokens(self, prompt: str) -> Tokens:
        ids, is_own, num_tokens = self._encoder.ids(prompt)
        return Tokens((ids, is_own), num_tokens - NUM_DROPPED)

    @torch.no_grad()
    def embed(self, ids: Sequence[Tensor]) -> dict[str, Tensor]:
        """As many rows as there can be, of which a prompt's own come first."""
        _, is_own = ids
        with one_thread():
            return {"text": self._fused(self._encoder.rows(*ids)[NUM_DROPPED:], is_own[0, NUM_DROPPED:])}

    def _fused(self, rows: Tensor, is_own: Tensor) -> Tensor:
        """rows: [L, layers · W]; is_own: bool [L], of the first ones. Returns [L, C]."""
        config, weights = self._config, self._weights
        x_LlW = rows.unflatten(1, (config.num_text_layers, config.text_hidden_dim))
        for block in weights.layerwise:
            x_LlW = self._block(block, x_LlW, None)
        x_1LW = torch.matmul(weights.projector, x_LlW).transpose(0, 1)
        for block in weights.refiners:
            x_1LW = self._block(block, x_1LW, is_own.view(1, 1, 1, -1))
        x = self._normed(x_1LW[0], weights.text_norm)
        inner, outer = weights.text_in.in_layer, weights.text_in.out_layer
        x = reference.gelu_tanh(reference.linear(x, inner.weight, inner.bias))
        return reference.linear(x, outer.weight, outer.bias)

    def _block(self, block: Block, x_BTW: Tensor, is_key: Tensor | None) -> Tensor:
        """B sequences of T tokens, each by itself."""
        before, before_mlp = block.norms
        x_BTW = x_BTW + self._attended(block, self._normed(x_BTW, before), is_key)
        inner = reference.linear(self._normed(x_BTW, before_mlp).flatten(0, 1), block.mlp_in.weight)
        out = reference.linear(reference.silu_product(inner), block.mlp_out.weight)
        return x_BTW + out.view_as(x_BTW)

    def _attended(self, block: Block, x_BTW: Tensor, is_key: Tensor | None) -> Tensor:
        config = self._config
        keys, width = config.text_num_key_value_heads, config.text_hidden_dim
        heads = [config.text_num_attention_heads, keys, keys, config.text_num_attention_heads]
        projected = reference.linear(x_BTW.flatten(0, 1), block.qkv_gate.weight)
        q, k, v, gate = projected.unflatten(1, (sum(heads), config.text_head_dim)).split(heads, dim=1)
        norms = block.q_norm, block.k_norm
        q, k, _ = reference.qk_norm_rope((q.float(), k.float(), v), *norms, None, config.norm_eps)
        per_key = config.text_num_attention_heads // keys
        q, k, v = (
            part.to(v.dtype).repeat_interleave(repeats, dim=1).unflatten(0, x_BTW.shape[:2]).transpose(1, 2)
            for part, repeats in ((q, 1), (k, per_key), (v, per_key))
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=is_key).transpose(1, 2).reshape(-1, width)
        gated = reference.sigmoid_product(attended, gate.flatten(1))
        return reference.linear(gated, block.out.weight).view_as(x_BTW)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return reference.rms_norm(x.float(), self._config.norm_eps, _factor(weight)).to(x.dtype)


def schedule(spec: ModelSpec, is_distilled: bool, num_steps: int, shape: StepShape) -> Schedule:
    shift = TURBO_SHIFT if is_distilled else None
    return euler_schedule(spec.scheduler, num_steps, shape.image, dynamic_shift=shift)


def components(spec: ModelSpec, load_format: LoadFormat) -> dict[str, Component]:
    path = Path(spec.path)
    config, num_layers = read_config(component_folder(path, "transformer") / "config.json"), max(layers(path))
    files = component_files(
        path,
        load_format,
        {
            "text_encoder": language_shapes_of(QWEN3_VL, num_layers),
            "vae": QwenImageCodec.shapes,
            "transformer": transformer_shapes,
        },
    )
    encoder = component_folder(path, "text_encoder")
    return {
        "text_encoder": language_component(QWEN3_VL, encoder, files["text_encoder"], num_layers),
        "vae": QwenImageCodec.component(files["vae"], spec),
        "transformer": Component(files["transformer"], weights_plan(config)),
    }


def network(spec: ModelSpec, tensors: Mapping[str, Tensor], ops: Ops) -> Krea2Transformer:
    config = read_config(component_folder(Path(spec.path), "transformer") / "config.json")
    return Krea2Transformer(config, tensors, ops, spec)


def build(spec: ModelSpec, load_format: LoadFormat, tensors: Mapping[str, Tensor], ops: Ops) -> Model:
    path = Path(spec.path)
    transformer = network(spec, component_tensors(tensors, "transformer"), ops)
    folder, own = component_folder(path, "text_encoder"), component_tensors(tensors, "text_encoder")
    encoder = LanguageEncoder(QWEN3_VL, folder, own, layers(path), prompt_reader(path))
    codec = QwenImageCodec(component_folder(path, "vae"), component_tensors(tensors, "vae"), spec)
    return Model(
        spec=spec,
        network=transformer,
        text=Krea2Text(encoder, transformer),
        codec=codec,
        begin=begins_with_noise(codec),
        schedule=functools.partial(schedule, spec, read_index(path).is_distilled),
        guidance_factor=lambda params: 1 + params.guidance,
    )
