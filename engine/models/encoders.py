"""Text encoders as families use them: library modules over given weights, on their device, and tokenizers.

Worker-only: importing it takes seconds.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import Tensor
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5Attention, T5EncoderModel
from transformers.models.t5.tokenization_t5 import T5Tokenizer

from tetrion.engine.config import LoadFormat
from tetrion.engine.families.hash_tokens import HashTokenizer
from tetrion.engine.families.library_shapes import BESIDE_CLIP, BESIDE_T5, CLIP_PREFIX, T5_EMBEDDINGS
from tetrion.engine.families.tokenizers import has_vocabulary
from tetrion.engine.families.weights import COUNTERS
from tetrion.engine.model_spec import CheckpointError
from tetrion.engine.models.dummy import module_shapes
from tetrion.engine.models.loading import build_module
from tetrion.engine.models.tokenizers import LibraryTokenizer, Tokenizer

ConfigT = TypeVar("ConfigT", CLIPTextConfig, T5Config)
ClipModel = CLIPTextModel | CLIPTextModelWithProjection


class ClipEncoder:
    """CLIP's text model over given weights. Its prompts are always as long as its tokenizer says."""

    KIND: ClassVar[type[ClipModel]] = CLIPTextModel

    def __init__(
        self, folder: Path, tokenizer: Path, tensors: Mapping[str, Tensor], load_format: LoadFormat = "safetensors"
    ) -> None:
        """Raises CheckpointError if the config, the tokenizer or a tensor is missing."""
        self._model = _build_clip(self.KIND, folder, tensors)
        self._tokenizer, self.num_ids = _clip_tokenizer(folder, tokenizer, load_format)

    @classmethod
    def shapes(cls, folder: Path) -> dict[str, tuple[int, ...]]:
        """Of all tensors that the config means. Raises CheckpointError if it is missing."""
        config = _load_config(CLIPTextConfig, folder)
        return module_shapes(lambda: cls.KIND(config))

    def ids(self, prompt: str) -> Tensor:
        """[1, num_ids] on the host."""
        return torch.tensor([self._tokenizer.ids(prompt, self.num_ids)])

    def num_tokens(self, prompt: str) -> int:
        """The prompt's own with both marks, before padding or truncation."""
        return self._tokenizer.num_tokens(prompt)

    def pooled(self, ids: Tensor) -> Tensor:
        """[hidden size]."""
        return self._model(ids).pooler_output[0]


class ProjectedClipEncoder(ClipEncoder):
    """CLIP's text model with the projection into the space that it shares with pictures."""

    KIND = CLIPTextModelWithProjection

    def rows_and_projected(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """What the last layer but one gives of each token, [num_ids, width], and the projected vector of the whole
        prompt, [projected width]."""
        result = self._model(ids, output_hidden_states=True)
        return result.hidden_states[-2][0], result.text_embeds[0]


class T5Encoder:
    """T5's encoder over given weights: prompts are padded to `num_ids`, without an attention mask."""

    def __init__(
        self,
        folder: Path,
        tokenizer: Path,
        tensors: Mapping[str, Tensor],
        load_format: LoadFormat = "safetensors",
        num_ids: int = 512,
    ) -> None:
        """Raises CheckpointError if the config, the tokenizer or a tensor is missing."""
        self._num_ids = num_ids
        self._model = _build_t5(folder, tensors)
        self._tokenizer = _t5_tokenizer(folder, tokenizer, load_format)

    @staticmethod
    def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
        """Of all tensors that the config means. Raises CheckpointError if it is missing."""
        config = _load_config(T5Config, folder)
        return module_shapes(lambda: T5EncoderModel(config))

    def ids(self, prompt: str) -> Tensor:
        """[1, num_ids] on the host."""
        return torch.tensor([self._tokenizer.ids(prompt, self._num_ids)])

    def num_tokens(self, prompt: str) -> int:
        """The prompt's own with the end mark, before padding or truncation."""
        return self._tokenizer.num_tokens(prompt)

    def rows(self, ids: Tensor) -> Tensor:
        """[num_ids, width]."""
        return self._model(ids)[0][0]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The GEMMs of a narrow encoder round differently with more, and encoding is a small share of a picture's work."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _clip_tokenizer(folder: Path, tokenizer: Path, load_format: LoadFormat) -> tuple[Tokenizer, int]:
    """The tokenizer, and how many tokens CLIP always gets."""
    if load_format == "dummy" and not has_vocabulary(tokenizer):
        config = _load_config(CLIPTextConfig, folder)
        end = config.vocab_size - 1
        return HashTokenizer(config.vocab_size, end=end, start=end - 1, padding=end), config.max_position_embeddings
    loaded = LibraryTokenizer(CLIPTokenizer, tokenizer)
    loaded.check_size(folder, _load_config(CLIPTextConfig, folder).vocab_size)
    return loaded, loaded.model_max_length


def _t5_tokenizer(folder: Path, tokenizer: Path, load_format: LoadFormat) -> Tokenizer:
    if load_format == "dummy" and not has_vocabulary(tokenizer):
        return HashTokenizer(_load_config(T5Config, folder).vocab_size, end=1)
    loaded = LibraryTokenizer(T5Tokenizer, tokenizer)
    loaded.check_size(folder, _load_config(T5Config, folder).vocab_size)
    return loaded


def _load_config(kind: type[ConfigT], folder: Path) -> ConfigT:
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"model: {str(folder)!r} holds no usable {kind.__name__}: {error}") from None


def _build_clip(kind: type[ClipModel], folder: Path, tensors: Mapping[str, Tensor]) -> ClipModel:
    config = _load_config(CLIPTextConfig, folder)
    clip = build_module(lambda: kind(config), _as_module_names(kind, config, tensors), folder, beside=BESIDE_CLIP)
    for module in clip.modules():
        if hasattr(module, "position_ids"):  # a buffer that no checkpoint stores, so still on the meta device
            positions = torch.arange(config.max_position_embeddings, device=clip.device)
            module.position_ids = positions.expand((1, -1))
    return clip


def _as_module_names(kind: type[ClipModel], config: CLIPTextConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIPTextModel called its tensors `text_model.…` until transformers 5; checkpoints have either."""
    with torch.device("meta"):
        names = kind(config).state_dict()
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        forms = name, f"{CLIP_PREFIX}{name}", name.removeprefix(CLIP_PREFIX)
        found[next((form for form in forms if form in names), name)] = tensor
    return {name: tensor for name, tensor in found.items() if not name.endswith(COUNTERS)}


def _build_t5(folder: Path, tensors: Mapping[str, Tensor]) -> T5EncoderModel:
    config = _load_config(T5Config, folder)
    tensors = dict(tensors)
    for name, other in (T5_EMBEDDINGS, T5_EMBEDDINGS[::-1]):  # one table under two names; checkpoints have either
        if name not in tensors and other in tensors:
            tensors[name] = tensors[other]
    t5 = build_module(lambda: T5EncoderModel(config), tensors, folder, beside=BESIDE_T5)
    layers = (module for module in t5.modules() if isinstance(module, T5Attention))
    first = next(layer for layer in layers if layer.has_relative_attention_bias)  # its bias serves all layers
    strided_bias = first.compute_bias
    # PyTorch's fused attention takes no mask whose last dimension is strided, as this bias is: attention falls back
    # to whole matrices in fp32, half of a prompt's time (and later libraries copy the bias for each layer)
    first.compute_bias = lambda *given, **named: strided_bias(*given, **named).contiguous()  # type: ignore[method-assign]
    return t5
