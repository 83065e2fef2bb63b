"""Prompt -> what the transformer is conditioned on: T5 embeddings and CLIP's pooled vector, as FluxPipeline does it.

Owns the text encoders: library modules over given weights, on those weights' device. Worker-only: importing it takes
seconds.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5Attention, T5EncoderModel
from transformers.models.t5.tokenization_t5 import T5Tokenizer

from tetrion.engine.config import LoadFormat
from tetrion.engine.families.checkpoint import component_folder, has_tokenizer
from tetrion.engine.model_spec import CheckpointError, ModelSpec
from tetrion.engine.models.dummy import HashTokenizer, module_shapes
from tetrion.engine.models.loading import build_module
from tetrion.engine.models.tokenizers import LibraryTokenizer, Tokenizer

ConfigT = TypeVar("ConfigT", CLIPTextConfig, T5Config)
CLIP_PREFIX = "text_model."
T5_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")


class PromptEmbedding(NamedTuple):
    """embeds: [max_text_tokens, text_dim]; pooled: [pooled_dim]. `num_tokens`: the prompt's own T5 tokens with the end
    mark, before padding or truncation; more than max_text_tokens means that the prompt was cut."""

    embeds: Tensor
    pooled: Tensor
    num_tokens: int


class PromptTokens(NamedTuple):
    """Ids on the host: clip [1, CLIP's length], t5 [1, max_text_tokens]; `num_tokens` as in PromptEmbedding."""

    clip: Tensor
    t5: Tensor
    num_tokens: int


class TextEncoders:
    """Both text encoders of a FLUX checkpoint."""

    def __init__(
        self,
        clip_tensors: Mapping[str, Tensor],
        t5_tensors: Mapping[str, Tensor],
        spec: ModelSpec,
        load_format: LoadFormat = "safetensors",
    ) -> None:
        """Raises CheckpointError if a config, tokenizer or tensor is missing, or widths are not the transformer's."""
        path = Path(spec.path)
        self._max_text_tokens = spec.max_text_tokens
        self._clip = _build_clip(component_folder(path, "text_encoder"), clip_tensors, spec.pooled_dim)
        self._t5 = _build_t5(component_folder(path, "text_encoder_2"), t5_tensors, spec.text_dim)
        self._clip_tokenizer, self._clip_tokens = _clip_tokenizer(path, load_format)
        self._t5_tokenizer = _t5_tokenizer(path, load_format)

    def encode(self, prompt: str) -> PromptEmbedding:
        """T5 padded to max_text_tokens without an attention mask; CLIP padded to its own length, pooled output."""
        tokens, device = self.tokens(prompt), self._t5.device
        embeds, pooled = self.embed(tokens.clip.to(device), tokens.t5.to(device))
        return PromptEmbedding(embeds=embeds, pooled=pooled, num_tokens=tokens.num_tokens)

    def tokens(self, prompt: str) -> PromptTokens:
        return PromptTokens(
            clip=torch.tensor([self._clip_tokenizer.ids(prompt, self._clip_tokens)]),
            t5=torch.tensor([self._t5_tokenizer.ids(prompt, self._max_text_tokens)]),
            num_tokens=self._t5_tokenizer.num_tokens(prompt),
        )

    @torch.no_grad()
    def embed(self, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids of one prompt on the encoders' device, shaped as `tokens` gives them -> embeds and pooled, as in
        PromptEmbedding.

        On one thread: the GEMMs of a narrow encoder round differently with more, and encoding is a small share of a
        picture's work.
        """
        with _one_thread():
            return self._t5(t5_ids)[0][0], self._clip(clip_ids).pooler_output[0]


def text_encoder_shapes(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes of all tensors that CLIP's and T5's configs mean. Raises CheckpointError if a config is missing."""
    clip, t5 = (
        _load_config(CLIPTextConfig, component_folder(path, "text_encoder")),
        _load_config(T5Config, component_folder(path, "text_encoder_2")),
    )
    return module_shapes(lambda: CLIPTextModel(clip)), module_shapes(lambda: T5EncoderModel(t5))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _clip_tokenizer(path: Path, load_format: LoadFormat) -> tuple[Tokenizer, int]:
    """The tokenizer, and how many tokens CLIP always gets."""
    if load_format == "dummy" and not has_tokenizer(component_folder(path, "tokenizer")):
        config = _load_config(CLIPTextConfig, component_folder(path, "text_encoder"))
        end = config.vocab_size - 1
        return HashTokenizer(config.vocab_size, end=end, start=end - 1, padding=end), config.max_position_embeddings
    tokenizer = LibraryTokenizer(CLIPTokenizer, component_folder(path, "tokenizer"))
    return tokenizer, tokenizer.model_max_length


def _t5_tokenizer(path: Path, load_format: LoadFormat) -> Tokenizer:
    if load_format == "dummy" and not has_tokenizer(component_folder(path, "tokenizer_2")):
        return HashTokenizer(_load_config(T5Config, component_folder(path, "text_encoder_2")).vocab_size, end=1)
    return LibraryTokenizer(T5Tokenizer, component_folder(path, "tokenizer_2"))


def _load_config(kind: type[ConfigT], folder: Path) -> ConfigT:
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"model: {str(folder)!r} holds no usable {kind.__name__}: {error}") from None


def _check_width(folder: Path, width: int, expected: int) -> None:
    if width != expected:
        raise CheckpointError(f"model: {str(folder)!r} gives vectors of {width}, the transformer takes {expected}")


def _build_clip(folder: Path, tensors: Mapping[str, Tensor], pooled_dim: int) -> CLIPTextModel:
    config = _load_config(CLIPTextConfig, folder)
    _check_width(folder, config.hidden_size, pooled_dim)
    tensors = {name.removeprefix(CLIP_PREFIX): tensor for name, tensor in tensors.items()}
    clip = build_module(lambda: CLIPTextModel(config), _with_module_prefix(CLIPTextModel, config, tensors), str(folder))
    for module in clip.modules():
        if hasattr(module, "position_ids"):  # a buffer that no checkpoint stores, so still on the meta device
            positions = torch.arange(config.max_position_embeddings, device=clip.device)
            module.position_ids = positions.expand((1, -1))
    return clip


def _with_module_prefix(
    kind: type[CLIPTextModel], config: CLIPTextConfig, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """CLIPTextModel called its tensors `text_model.…` until transformers 5; checkpoints have either."""
    with torch.device("meta"):
        names = kind(config).state_dict()
    prefix = CLIP_PREFIX if any(name.startswith(CLIP_PREFIX) for name in names) else ""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _build_t5(folder: Path, tensors: Mapping[str, Tensor], text_dim: int) -> T5EncoderModel:
    config = _load_config(T5Config, folder)
    _check_width(folder, config.d_model, text_dim)
    tensors = dict(tensors)
    for name, other in (T5_EMBEDDINGS, T5_EMBEDDINGS[::-1]):  # one table under two names; checkpoints have either
        if name not in tensors and other in tensors:
            tensors[name] = tensors[other]
    t5 = build_module(lambda: T5EncoderModel(config), tensors, str(folder))
    layers = (module for module in t5.modules() if isinstance(module, T5Attention))
    first = next(layer for layer in layers if layer.has_relative_attention_bias)  # its bias serves all layers
    strided_bias = first.compute_bias
    # PyTorch's fused attention takes no mask whose last dimension is strided, as this bias is: attention falls back
    # to whole matrices in fp32, half of a prompt's time (and later libraries copy the bias for each layer)
    first.compute_bias = lambda *given, **named: strided_bias(*given, **named).contiguous()  # type: ignore[method-assign]
    return t5
