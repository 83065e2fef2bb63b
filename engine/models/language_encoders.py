"""Language models as text encoders: hidden states of some layers of a library module, over given weights.

Owns how a prompt's ids become rows, whatever the model: padded to one length, causal, with the prompt's own tokens as
the only keys. Layers beyond the last one that is asked for are neither loaded nor run. Another model of the same kind
is three classes (`LanguageKind`). Worker-only: importing it takes seconds.

Shapes: L, the padded length.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.mistral.modeling_mistral import MistralModel, MistralRotaryEmbedding
from transformers.models.mistral3.configuration_mistral3 import Mistral3Config
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding, Qwen2_5_VLTextModel
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model, Qwen3RotaryEmbedding
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel, Qwen3VLTextRotaryEmbedding

from tetrion.engine.families.library_shapes import language_prefix
from tetrion.engine.families.plan import Part
from tetrion.engine.families.prompts import PromptReader
from tetrion.engine.model_spec import CheckpointError
from tetrion.engine.models.dummy import module_shapes
from tetrion.engine.models.loading import Component, TensorFiles, build_module


class LanguageKind(NamedTuple):
    """A language model of transformers: its classes. `config` may be of a model that it is part of."""

    config: type[PretrainedConfig]
    model: type[PreTrainedModel]
    rotary: type[nn.Module]


QWEN3 = LanguageKind(Qwen3Config, Qwen3Model, Qwen3RotaryEmbedding)
QWEN25_VL = LanguageKind(Qwen2_5_VLConfig, Qwen2_5_VLTextModel, Qwen2_5_VLRotaryEmbedding)
QWEN3_VL = LanguageKind(Qwen3VLConfig, Qwen3VLTextModel, Qwen3VLTextRotaryEmbedding)
MISTRAL3 = LanguageKind(Mistral3Config, MistralModel, MistralRotaryEmbedding)


class LanguageIds(NamedTuple):
    """`ids`: int64 [1, L]; `is_own`: bool [1, L], which of them are the prompt's own. On the host."""

    ids: Tensor
    is_own: Tensor
    num_tokens: int


class LanguageEncoder:
    """`layers`: whose outputs are put side by side, 1 being the first's. `is_normed`: by the norm behind all layers."""

    def __init__(
        self,
        kind: LanguageKind,
        folder: Path,
        tensors: Mapping[str, Tensor],
        layers: Sequence[int],
        reader: PromptReader,
        is_normed: bool = False,
    ) -> None:
        """Raises CheckpointError if a tensor is missing."""
        config = _load_config(kind, folder, max(layers))
        self._layers, self._reader = tuple(layers), reader
        self._model: Any = build_module(_builder(kind, config, is_normed), tensors, folder)
        device = next(self._model.parameters()).device
        self._model.rotary_emb = kind.rotary(config=config).to(device)  # its buffer is in no checkpoint

    def ids(self, prompt: str) -> LanguageIds:
        own, num_tokens = self._reader.read(prompt)
        ids = torch.full((1, self._reader.max_tokens), self._reader.padding)
        start = ids.shape[1] - len(own) if self._reader.pads_left else 0
        is_own = torch.zeros_like(ids, dtype=torch.bool)
        ids[0, start : start + len(own)] = torch.tensor(own, dtype=torch.int64)
        is_own[0, start : start + len(own)] = True
        return LanguageIds(ids, is_own, num_tokens)

    def rows(self, ids: Tensor, is_own: Tensor) -> Tensor:
        """[L, width of all layers]. Rows of padding look at the prompt's own tokens alone, as in diffusers."""
        x_1LC = self._model.embed_tokens(ids)
        position_L = torch.arange(ids.shape[1], device=ids.device)
        position_1L = position_L.unsqueeze(0)
        mask_LL = (position_1L <= position_L.unsqueeze(1)) & is_own
        rotations, outputs = self._model.rotary_emb(x_1LC, position_1L), {}
        for i, layer in enumerate(self._model.layers, start=1):
            outputs[i] = x_1LC = layer(
                x_1LC, attention_mask=mask_LL[None, None], position_ids=position_1L, position_embeddings=rotations
            )
        return torch.cat([self._model.norm(outputs[i][0]) for i in self._layers], dim=-1)


def language_shapes_of(
    kind: LanguageKind, num_layers: int, is_normed: bool = False
) -> Callable[[Path], dict[str, tuple[int, ...]]]:
    """Of all tensors that a component's config means, without those of further layers."""
    return lambda folder: module_shapes(_builder(kind, _load_config(kind, folder, num_layers), is_normed))


def language_component(
    kind: LanguageKind, folder: Path, files: TensorFiles, num_layers: int, is_normed: bool = False
) -> Component:
    """What is loaded of a checkpoint that may hold more: a head, further layers."""
    prefix = language_prefix(files.names)
    names = language_shapes_of(kind, num_layers, is_normed)(folder)
    return Component(files, {name: Part((f"{prefix}{name}",)) for name in names})


def _builder(kind: LanguageKind, config: PretrainedConfig, is_normed: bool) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        model: Any = kind.model(config)
        if not is_normed:
            model.norm = nn.Identity()
        return model

    return build


def _load_config(kind: LanguageKind, folder: Path, num_layers: int) -> PretrainedConfig:
    """For the first layers alone."""
    try:
        config: Any = kind.config.from_pretrained(folder, local_files_only=True).get_text_config()
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"model: {str(folder)!r} holds no usable {kind.config.__name__}: {error}") from None
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:num_layers]
    config._attn_implementation = "sdpa"
    loaded: PretrainedConfig = config
    return loaded
