"""Z-Image's transformer on one member's rows of a sequence: refiners of the picture alone, then layers over picture and
text in one stream. Every half of a block is normed before and behind (RMSNorm), its gate goes through a tanh.

Owns the forward pass, modulations, rotary tables, how prompts become text rows. Knows nothing of devices, groups or
requests: the operators, and attention over the whole sequence, are arguments.
Source: arXiv:2511.22699; diffusers' ZImageTransformer2DModel and ZImagePipeline, whose results it reproduces.

The text's refiners know neither step nor picture: they are run where a prompt is encoded. Norms' weights are part of
the factors and gates of the table, so the norms between sub-blocks have none.

Shapes: n rows of this member, C hidden size, S steps, V modulation vectors, B blocks, T rows of text.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from torch import Tensor

from tetrion.engine.config import LoadFormat
from tetrion.engine.families.checkpoint import component_folder
from tetrion.engine.families.components import read_qwen3
from tetrion.engine.families.zimage import (
    NORMS,
    ROW_MULTIPLE,
    VECTORS,
    VECTORS_AT_END,
    ZImageConfig,
    num_encoder_layers,
    prompt_reader,
    read_config,
    weights_plan,
)
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.autoencoders import Autoencoder, begins_with_a_picture, unused_parts
from tetrion.engine.models.dummy import module_shapes
from tetrion.engine.models.encoders import one_thread
from tetrion.engine.models.family import Attend, Constant, Model, Picture, ToDevice, Tokens
from tetrion.engine.models.language_encoders import QWEN3, LanguageEncoder, language_component, language_shapes_of
from tetrion.engine.models.layers import Embedder, linear_of, rotary_angles, take, timestep_embedding
from tetrion.engine.models.loading import Component, component_tensors
from tetrion.engine.models.ops import Linear, Ops
from tetrion.engine.models.sources import component_files, whole
from tetrion.engine.parallel.exchange import Rope, Stream
from tetrion.engine.params import Params
from tetrion.engine.sampling.flow_match import Schedule, euler_schedule
from tetrion.engine.shape import StepShape
from tetrion.kernels import reference
from tetrion.kernels.reference import Branch

IMAGE, TEXT = 0, 1
"""Segments, in canonical order."""
QK_EPSILON = 1e-5
ENCODING = ("text_norm", "text_in.", "text_padding", "context_refiner.")
"""See `models.family.FamilyModule`."""


def transformer_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that `transformer/config.json` means, by their names in a diffusers checkpoint."""
    config = json.loads((folder / "config.json").read_bytes())
    return module_shapes(functools.partial(ZImageTransformer2DModel.from_config, config))


@dataclass(frozen=True, slots=True)
class Block:
    """`qkv`: [3·C, C]; `mlp_in`: [2·F, C], of a gated MLP. `norms`: weights before and behind attention, before and
    behind the MLP, [4, C]."""

    qkv: Linear
    q_norm: Tensor
    k_norm: Tensor
    out: Linear
    mlp_in: Linear
    mlp_out: Linear
    norms: tuple[Tensor, Tensor, Tensor, Tensor]

    def stream(self, ops: Ops, x: Tensor, segments: tuple[int, ...]) -> Stream:
        return Stream(ops.linear(x, self.qkv), segments, self.q_norm, self.k_norm, epsilon=QK_EPSILON)


@dataclass(frozen=True, slots=True)
class ZImageWeights:
    """All of the transformer. `modulation` computes every block's raw vectors from the time's: [4·B·C, time width]."""

    image_in: Linear
    image_padding: Tensor
    text_norm: Tensor
    text_in: Linear
    text_padding: Tensor
    time_in: Embedder
    modulation: Linear
    final_scale: Linear
    text_refiners: tuple[Block, ...]
    image_refiners: tuple[Block, ...]
    layers: tuple[Block, ...]
    final: Linear


def build_weights(config: ZImageConfig, tensors: Mapping[str, Tensor]) -> ZImageWeights:
    """Arrange tensors named as in `weights_plan`. No copies."""
    layer = functools.partial(linear_of, tensors)

    def block(name: str) -> Block:
        before, behind, before_mlp, behind_mlp = (tensors[f"{name}.{norm}"] for norm in NORMS)
        return Block(
            qkv=layer(f"{name}.qkv"),
            q_norm=tensors[f"{name}.q_norm"],
            k_norm=tensors[f"{name}.k_norm"],
            out=layer(f"{name}.out"),
            mlp_in=layer(f"{name}.mlp_in"),
            mlp_out=layer(f"{name}.mlp_out"),
            norms=(before, behind, before_mlp, behind_mlp),
        )

    stepped = tuple(map(block, config.stepped_blocks))
    return ZImageWeights(
        image_in=layer("image_in"),
        image_padding=tensors["image_padding"],
        text_norm=tensors["text_norm"],
        text_in=layer("text_in"),
        text_padding=tensors["text_padding"],
        time_in=Embedder.of(tensors, "time_in"),
        modulation=layer("modulation"),
        final_scale=layer("final_scale"),
        text_refiners=tuple(map(block, config.text_blocks)),
        image_refiners=stepped[: config.n_refiner_layers],
        layers=stepped[config.n_refiner_layers :],
        final=layer("final"),
    )


def modulations(
    ops: Ops, weights: ZImageWeights, config: ZImageConfig, timesteps: Tensor, dtype: torch.dtype
) -> Tensor:
    """Every block's factors and gates for all steps of a request, with its norms' weights in them: [S, V, C].

    timesteps: [S] fp32, as the scheduler gives them (0 … 1000). The network counts from the other end.
    """
    times = (1000 - timesteps) / 1000 * config.t_scale
    time = weights.time_in(ops, timestep_embedding(times).to(dtype))
    raw_SBVC = ops.linear(time, weights.modulation).view(len(timesteps), -1, VECTORS, config.dim)
    blocks = (*weights.image_refiners, *weights.layers)
    norms_BVC = torch.stack([torch.stack(block.norms) for block in blocks]).float()
    factor, gate, mlp_factor, mlp_gate = raw_SBVC.float().unbind(2)
    folded = torch.stack([1 + factor, gate.tanh(), 1 + mlp_factor, mlp_gate.tanh()], dim=2) * norms_BVC
    scale = ops.linear(ops.silu(time), weights.final_scale).unsqueeze(1)
    return torch.cat([folded.flatten(1, 2).to(dtype), torch.zeros_like(scale), scale], dim=1)


def rope(config: ZImageConfig, rows: int, columns: int, num_image: int, num_text: int) -> Rope:
    """Rotary tables of a whole sequence: cos, sin [num_image + num_text, head_dim / 2]; sizes in tokens.

    Positions are (1 + i, 0, 0) for text, (1 + T, row, column) for the picture, whose `num_image` rows are filled up
    with some at the origin. Angles are rounded to fp32, as diffusers does.
    """
    image = torch.zeros(num_image, 3)
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2)
    image[: len(grid), 0] = num_text + 1
    image[: len(grid), 1:] = grid
    text = torch.zeros(num_text, 3)
    text[:, 0] = torch.arange(1, num_text + 1)
    return _turns(config, torch.cat([image, text]))


def _turns(config: ZImageConfig, positions: Tensor) -> Rope:
    """cos, sin [n, head_dim / 2] of positions [n, 3], which are on the host."""
    angles = rotary_angles(positions, config.axes_dims, config.rope_theta).float()
    return angles.cos(), angles.sin()


def step(
    ops: Ops,
    config: ZImageConfig,
    weights: ZImageWeights,
    latents: Tensor,
    text: Tensor,
    is_padding: Tensor,
    vectors: Tensor,
    attend: Attend,
) -> Tensor:
    """Velocity [n_img, token width] at one step, for this member's rows.

    latents: [n_img, token width]; text: [n_txt, C], refined; is_padding: bool [n_img, 1]; vectors: all of
    `modulations`, of which `ops` knows the step.
    """
    rows, epsilon = iter(vectors.unbind(-2)), config.norm_eps
    x = torch.where(is_padding, weights.image_padding, ops.linear(latents, weights.image_in))
    for block in weights.image_refiners:
        x = _block(ops, block, x, take(rows, VECTORS), (IMAGE,), attend, epsilon)
    x = torch.cat([x, text])
    for block in weights.layers:
        x = _block(ops, block, x, take(rows, VECTORS), (IMAGE, TEXT), attend, epsilon)
    shift, scale = take(rows, VECTORS_AT_END)
    ((_, modulated),) = ops.residual_modulate([Branch(x[: len(latents)], shift, scale)])
    return ops.narrow_linear(modulated, weights.final).neg_()


def _block(
    ops: Ops,
    block: Block,
    x: Tensor,
    vectors: Sequence[Tensor],
    segments: tuple[int, ...],
    attend: Attend,
    epsilon: float,
) -> Tensor:
    factor, gate, mlp_factor, mlp_gate = vectors
    _, normed = ops.residual_rms(x, factor, epsilon=epsilon)
    out = ops.linear(attend([block.stream(ops, normed, segments)]), block.out)
    x, normed = ops.residual_rms(x, mlp_factor, gate, out, epsilon=epsilon)
    out = ops.linear(ops.gated_linear(normed, block.mlp_in), block.mlp_out)
    return ops.gated_rms_sum(x, mlp_gate, out, epsilon=epsilon)


class ZImageTransformer:
    """The network of `models.family.Network`: config, weights and operators together."""

    def __init__(self, config: ZImageConfig, tensors: Mapping[str, Tensor], ops: Ops, spec: ModelSpec) -> None:
        self.config, self._sizes = config, spec.sizes
        self.weights = build_weights(config, tensors)
        self.ops = ops
        self.num_vectors, self.hidden_size = config.num_vectors, config.dim
        self.out_channels = config.token_width

    def vectors(self, fields: Mapping[str, Tensor], times: Tensor, params: Params) -> Tensor:
        return modulations(self.ops, self.weights, self.config, times, fields["text"].dtype)

    def constants(self, fields: Mapping[str, Tensor], shape: StepShape, branch: int) -> Mapping[str, Constant]:
        text = fields["text"][: shape.text[branch]]
        rows = torch.arange(shape.image, device=text.device)
        is_padding = (rows >= self._sizes.num_covered(shape.width, shape.height)).unsqueeze(1)
        return {"text": Constant(text, TEXT), "is_padding": Constant(is_padding, IMAGE)}

    def rope(self, shape: StepShape, branch: int) -> Rope:
        rows, columns = shape.height // self._sizes.multiple, shape.width // self._sizes.multiple
        return rope(self.config, rows, columns, shape.image, shape.text[branch])

    def step(self, latents: Tensor, constants: Mapping[str, Tensor], vectors: Tensor, attend: Attend) -> Tensor:
        text, is_padding = constants["text"], constants["is_padding"]
        return step(self.ops, self.config, self.weights, latents, text, is_padding, vectors, attend)


class ZImageText:
    """Rows of a language model's last layer but one, projected, filled up and refined."""

    def __init__(self, encoder: LanguageEncoder, network: ZImageTransformer, max_tokens: int) -> None:
        self._encoder, self._config, self._weights = encoder, network.config, network.weights
        positions = torch.zeros(max_tokens, 3)
        positions[:, 0] = torch.arange(1, max_tokens + 1)
        device = network.weights.text_norm.device
        self._rope = tuple(table.repeat_interleave(2, dim=1).to(device) for table in _turns(network.config, positions))

    def tokens(self, prompt: str) -> Tokens:
        ids, is_own, num_tokens = self._encoder.ids(prompt)
        return Tokens((ids, is_own), num_tokens)

    @torch.no_grad()
    def embed(self, ids: Sequence[Tensor]) -> dict[str, Tensor]:
        """As many rows as there can be, of which a prompt's own and those that fill them up come first."""
        with one_thread():
            return {"text": self._refined(self._encoder.rows(*ids), ids[1][0])}

    def _refined(self, embeds: Tensor, is_own: Tensor) -> Tensor:
        """`is_own`: bool [L], of the first rows."""
        weights, epsilon = self._weights, self._config.norm_eps
        normed = reference.rms_norm(embeds, epsilon, weights.text_norm)
        row = torch.arange(len(embeds), device=embeds.device)
        x = reference.linear(normed, weights.text_in.weight, weights.text_in.bias)
        x = torch.where(is_own.unsqueeze(1), x, weights.text_padding)
        is_key = row < (is_own.sum() + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
        for block in weights.text_refiners:
            before, behind, before_mlp, behind_mlp = block.norms
            qkv = reference.linear(reference.rms_norm(x, epsilon, before), block.qkv.weight)
            out = reference.linear(self._attend(qkv, block, is_key), block.out.weight)
            x = x + reference.rms_norm(out, epsilon, behind)
            inner = reference.linear(reference.rms_norm(x, epsilon, before_mlp), block.mlp_in.weight)
            out = reference.linear(reference.silu_product(inner), block.mlp_out.weight)
            x = x + reference.rms_norm(out, epsilon, behind_mlp)
        return x

    def _attend(self, qkv: Tensor, block: Block, is_key: Tensor) -> Tensor:
        """[L, C] over the keys alone."""
        qkv_fp32 = qkv.float().unflatten(1, (3, self._config.n_heads, self._config.head_dim))
        cos, sin = self._rope
        parts = reference.qk_norm_rope(qkv_fp32, block.q_norm.float(), block.k_norm.float(), (cos, sin), QK_EPSILON)
        q, k, v = (part.to(qkv.dtype).transpose(0, 1).unsqueeze(0) for part in parts)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=is_key.view(1, 1, 1, -1))[0].transpose(0, 1).flatten(1)


class ZImageCodec(Autoencoder):
    """Rows that cover nothing begin as zeros; what becomes of them is of no account."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
        super().__init__(folder, tensors, spec)
        self._sizes = spec.sizes

    def noise(self, seed: int, shape: StepShape) -> Tensor:
        return self._filled_up(super().noise(seed, shape))

    def noised(self, picture: Tensor, generator: torch.Generator, level: float, to_device: ToDevice) -> Tensor:
        return self._filled_up(super().noised(picture, generator, level, to_device))

    def decode(self, latents: Tensor, shape: StepShape) -> Picture:
        return super().decode(latents[: self._sizes.num_covered(shape.width, shape.height)], shape)

    def _filled_up(self, packed: Tensor) -> Tensor:
        multiple = self._sizes.row_multiple
        return F.pad(packed, (0, 0, 0, -len(packed) % multiple))


def schedule(spec: ModelSpec, num_steps: int, shape: StepShape) -> Schedule:
    num_covered = spec.sizes.num_covered(shape.width, shape.height)
    return euler_schedule(spec.scheduler, num_steps, num_covered, "even in fp32")


def components(spec: ModelSpec, load_format: LoadFormat) -> dict[str, Component]:
    path = Path(spec.path)
    config = read_config(component_folder(path, "transformer") / "config.json")
    encoder, num_layers = _encoder(spec)
    files = component_files(
        path,
        load_format,
        {
            "text_encoder": language_shapes_of(QWEN3, num_layers),
            "vae": Autoencoder.shapes,
            "transformer": transformer_shapes,
        },
    )
    return {
        "text_encoder": language_component(QWEN3, encoder, files["text_encoder"], num_layers),
        "vae": whole(files["vae"], without=unused_parts(spec)),
        "transformer": Component(files["transformer"], weights_plan(config)),
    }


def network(spec: ModelSpec, tensors: Mapping[str, Tensor], ops: Ops) -> ZImageTransformer:
    config = read_config(component_folder(Path(spec.path), "transformer") / "config.json")
    return ZImageTransformer(config, tensors, ops, spec)


def build(spec: ModelSpec, load_format: LoadFormat, tensors: Mapping[str, Tensor], ops: Ops) -> Model:
    path = Path(spec.path)
    transformer = network(spec, component_tensors(tensors, "transformer"), ops)
    folder, num_layers = _encoder(spec)
    own = component_tensors(tensors, "text_encoder")
    encoder = LanguageEncoder(QWEN3, folder, own, [num_layers], prompt_reader(path))
    codec = ZImageCodec(component_folder(path, "vae"), component_tensors(tensors, "vae"), spec)
    levels = functools.partial(schedule, spec)
    return Model(
        spec=spec,
        network=transformer,
        text=ZImageText(encoder, transformer, spec.max_text_tokens),
        codec=codec,
        begin=begins_with_a_picture(codec, levels),
        schedule=levels,
        guidance_factor=lambda params: 1 + params.guidance,
    )


def _encoder(spec: ModelSpec) -> tuple[Path, int]:
    """The text encoder's folder, and how many of its layers are run."""
    folder = component_folder(Path(spec.path), "text_encoder")
    return folder, num_encoder_layers(read_qwen3(folder, 2, spec.max_text_tokens))
