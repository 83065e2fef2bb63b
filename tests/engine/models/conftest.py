"""Tiny FLUX checkpoints with random weights in diffusers layout, and the pipelines to compare on them."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from tetrion.engine.config import LoadFormat
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.models.ops import ReferenceOps
from tetrion.engine.models.registry import load_shared
from tetrion.engine.parallel.exchange import Rope, Stream
from tetrion.engine.params import Params
from tetrion.kernels.reference import attention, guided_step, qk_norm_rope

T5_DIM, CLIP_DIM = 24, 20
MakeCheckpoint = Callable[..., Path]


@pytest.fixture(autouse=True)
def one_thread_no_grad() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Builds a checkpoint folder once per set of options."""
    made: dict[str, Path] = {}

    def make(guidance_embeds: bool = False, dynamic_shift: bool = True, max_text_tokens: int = 32) -> Path:
        key = f"guidance-{guidance_embeds}-dynamic-{dynamic_shift}-text-{max_text_tokens}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("checkpoint") / key
            _save_checkpoint(made[key], guidance_embeds, dynamic_shift, max_text_tokens)
        return made[key]

    return make


class Loaded:
    """A model over plain operators. `step`: the counter that they look at."""

    def __init__(
        self, path: Path, fd: int, *, publish_weights: bool = True, load_format: LoadFormat = "safetensors"
    ) -> None:
        self.step = torch.zeros(1, dtype=torch.int32)
        spec = read_model_spec(path, load_format)
        (self.model,) = load_shared([spec], fd, publish_weights, load_format, ReferenceOps(self.step))
        self.spec, self.network, self.codec = spec, self.model.network, self.model.codec

    def embed(self, prompt: str) -> dict[str, Tensor]:
        return self.model.text.embed(self.model.text.tokens(prompt).ids)

    def velocity(
        self, latents: Tensor, constants: dict[str, Tensor], vectors: Tensor, step: int, attend: Any
    ) -> Tensor:
        self.step.fill_(step)
        return self.network.step(latents, constants, vectors, attend)

    def generate(
        self, prompt: str, width: int, height: int, seed: int, num_steps: int, guidance: float = 3.5
    ) -> tuple[Tensor, np.ndarray]:
        """The whole model at degree 1: latents and picture."""
        shape = self.spec.shape(width, height)
        params = Params(model=self.spec.name, shape=shape, num_steps=num_steps, guidance=guidance, seed=seed)
        fields, (times, coefficients, _) = self.embed(prompt), self.model.schedule(num_steps, shape)
        vectors = self.network.vectors(fields, times, params)
        constants = {name: c.tensor for name, c in self.network.constants(fields, shape, 0).items()}
        state, attend = (
            self.codec.noise(seed, shape),
            LocalAttention(self.network.rope(shape, 0), shape.counts(self.spec.segments)),
        )
        for i in range(num_steps):
            velocity = self.velocity(state, constants, vectors, i, attend)
            state = guided_step(state, [velocity], coefficients[i], 1.0)
        return state, self.codec.decode(state, shape).pixels.numpy()


class LocalAttention:
    """One device's: `attend` over whole segments of `counts` rows."""

    def __init__(self, rope: Rope | None, counts: Sequence[int]) -> None:
        self._rope, self._counts = rope, counts
        self.calls: list[list[Stream]] = []

    def __call__(self, streams: Sequence[Stream]) -> Tensor:
        self.calls.append(list(streams))
        head_dim = next(len(s.q_norm) for s in streams if s.q_norm is not None)
        parts = [
            qk_norm_rope(
                stream.qkv.unflatten(1, (3, -1, head_dim)),
                stream.q_norm,
                stream.k_norm,
                self._turns(stream),
                stream.epsilon,
            )
            for stream in streams
        ]
        q, k, v = (torch.cat(part) for part in zip(*parts, strict=True))
        return attention(q, k, v).flatten(1)

    def _turns(self, stream: Stream) -> Rope | None:
        if self._rope is None or not stream.has_rope:
            return None
        cos, sin = (
            torch.cat([table.split(list(self._counts))[s] for s in stream.segments]).repeat_interleave(2, dim=1)
            for table in self._rope
        )
        return cos, sin


LoadFolder = Callable[[Path], Loaded]


@pytest.fixture
def load() -> Iterator[LoadFolder]:
    """Loads a checkpoint folder through a shared segment of its own."""
    fds: list[int] = []

    def load_folder(path: Path) -> Loaded:
        fds.append(os.memfd_create("test-weights"))
        return Loaded(path, fds[-1])

    yield load_folder
    for fd in fds:
        os.close(fd)


def _save_checkpoint(path: Path, guidance_embeds: bool, dynamic_shift: bool, max_text_tokens: int) -> None:
    torch.manual_seed(len(path.name))
    clip_tokenizer, t5_tokenizer = _clip_tokenizer(), _t5_tokenizer()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=dynamic_shift, shift=1.0 if dynamic_shift else 3.0
        ),
        vae=_random(AutoencoderKL(
            block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, layers_per_block=1,
            scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=True,
        )),
        text_encoder=CLIPTextModel(CLIPTextConfig(
            vocab_size=len(clip_tokenizer), hidden_size=CLIP_DIM, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=2, projection_dim=CLIP_DIM, bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id, pad_token_id=clip_tokenizer.pad_token_id,
        )),
        tokenizer=clip_tokenizer,
        text_encoder_2=T5EncoderModel(T5Config(
            vocab_size=len(t5_tokenizer), d_model=T5_DIM, d_kv=6, d_ff=32, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu",
        )),
        tokenizer_2=t5_tokenizer,
        transformer=_random(FluxTransformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=12,
            joint_attention_dim=T5_DIM, pooled_projection_dim=CLIP_DIM, guidance_embeds=guidance_embeds,
            axes_dims_rope=(2, 2, 4),
        )),
    )  # fmt: skip
    pipeline.save_pretrained(path, max_shard_size="1MB")
    preset: dict[str, Any] = {"name": "tiny", "num_steps": 3, "max_text_tokens": max_text_tokens, "guidance": 3.5}
    (path / "preset.json").write_bytes(msgspec.json.encode(preset))


def _random(module: torch.nn.Module) -> torch.nn.Module:
    """Random norms and biases too: at their initial ones and zeros, a mixed-up pair would not show."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.data = torch.randn_like(parameter) * 0.2 + (1.0 if "norm" in name and "weight" in name else 0.0)
    return module


def _clip_tokenizer() -> CLIPTokenizer:
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def _t5_tokenizer() -> T5Tokenizer:
    words = ["red", "blue", "circle", "square", "above", *"abcdefghijklmnopqrstuvwxyz"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(word, -2.0 - 0.01 * i) for i, word in enumerate(words)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
