"""Which words of a prompt an embedded model does not know: it has seen few, and draws nothing of the others."""

import functools
from pathlib import Path

import msgspec

from tetrion.engine.families.checkpoint import component_folder
from tetrion.engine.families.locate import embedded_models
from tetrion.engine.families.tokenizers import WHOLE
from tetrion.engine.model_spec import ModelSpec

COMPONENTS = ("tokenizer_3", "tokenizer_2")
"""The first one that is there is T5's."""
WORD_MARK = "▁"
"""Before pieces that begin a word. A single character is no word, but a piece of unknown ones."""


class _Model(msgspec.Struct, frozen=True):
    vocab: list[tuple[str, float]]


class _Tokenizer(msgspec.Struct, frozen=True):
    model: _Model


def unknown_words(spec: ModelSpec, prompt: str) -> tuple[str, ...]:
    """In the order of the prompt, lower case, each once. None of a model that does not ship with the package: it may
    know every word."""
    known = _known_words(Path(spec.path))
    words = (word.strip(".,;:!?\"'()[]{}").lower() for word in prompt.split()) if known else ()
    return tuple(dict.fromkeys(word for word in words if word and word not in known))


@functools.cache
def _known_words(folder: Path) -> frozenset[str]:
    if folder.resolve() not in [embedded.resolve() for embedded in embedded_models().values()]:
        return frozenset()
    files = [component_folder(folder, component) / WHOLE for component in COMPONENTS]
    tokenizer = next((file for file in files if file.is_file()), None)
    if tokenizer is None:  # configs only, for `dummy`
        return frozenset()
    pieces = [piece for piece, _ in msgspec.json.decode(tokenizer.read_bytes(), type=_Tokenizer).model.vocab]
    return frozenset(piece.removeprefix(WORD_MARK).lower() for piece in pieces if piece.startswith(WORD_MARK))
