"""A text encoder's tokenizer folder: whether it holds a vocabulary, of the right kind, that the encoder has rows for.

Libraries make a tokenizer of what is left where there is no vocabulary, and say nothing. Makes no tokenizer.
"""

import importlib.util
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from tetrion.engine.errors import shown
from tetrion.engine.families.components import convert
from tetrion.engine.families.files import decode, fault, read_file, read_object
from tetrion.engine.families.plan import some_of

TOKENIZER_CONFIG = "tokenizer_config.json"
WHOLE = "tokenizer.json"
SENTENCEPIECE = "spiece.model"
CONVERSION = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
"""Modules that it takes to read a sentencepiece model -> the packages that have them."""
_Id = Annotated[int, Meta(ge=0, le=2**62)]


class TokenizerKind(NamedTuple):
    """`name`: transformers' class. `parts`: what may be there in place of tokenizer.json, if anything. `model`: what
    that is of. `others`: further names that checkpoints have for it."""

    name: str
    parts: tuple[str, ...]
    model: Literal["BPE", "Unigram"]
    others: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """What checkpoints call it."""
        return self.name, f"{self.name}Fast", *self.others


CLIP_TOKENIZER = TokenizerKind("CLIPTokenizer", ("vocab.json", "merges.txt"), "BPE")
T5_TOKENIZER = TokenizerKind("T5Tokenizer", (SENTENCEPIECE,), "Unigram")
QWEN_TOKENIZER = TokenizerKind("Qwen2Tokenizer", (), "BPE")
MISTRAL_TOKENIZER = TokenizerKind("LlamaTokenizer", (), "BPE", ("PreTrainedTokenizerFast", "TokenizersBackend"))


_Token = str | dict[str, Any] | None


class _Config(msgspec.Struct, frozen=True):
    """Of tokenizer_config.json, what libraries make of without a word of the file's name if it is wrong."""

    bos_token: _Token = None
    eos_token: _Token = None
    unk_token: _Token = None
    pad_token: _Token = None


class _Model(msgspec.Struct, frozen=True):
    """`vocab`: pieces with their ids, or pieces with their scores in the order of their ids."""

    vocab: dict[str, _Id] | list[tuple[str, float]] = {}
    type: str | None = None


class _Added(msgspec.Struct, frozen=True):
    id: _Id
    content: str


class _Whole(msgspec.Struct, frozen=True):
    model: _Model
    added_tokens: list[_Added] = []


def has_vocabulary(folder: Path) -> bool:
    """Whether a component folder holds a tokenizer of whatever kind."""
    kinds = ((WHOLE,), CLIP_TOKENIZER.parts, T5_TOKENIZER.parts)
    complete = any(all((folder / name).is_file() for name in names) for names in kinds)
    return complete and (folder / TOKENIZER_CONFIG).is_file()


def missing_files(folder: Path, kind: TokenizerKind) -> list[str]:
    """What a tokenizer's folder lacks."""
    missing = [] if (folder / TOKENIZER_CONFIG).is_file() else [TOKENIZER_CONFIG]
    lacking = [name for name in kind.parts if not (folder / name).is_file()]
    if not (folder / WHOLE).is_file() and not kind.parts:
        missing.append(WHOLE)
    elif not (folder / WHOLE).is_file() and lacking:
        found = [name for name in kind.parts if name not in lacking]
        missing.append(" and ".join(lacking) if found else f"{WHOLE} (or {' and '.join(kind.parts)})")
    return missing


def check_tokenizer(folder: Path, kind: TokenizerKind, vocab_size: int) -> None:
    """Raises CheckpointError for a vocabulary that is damaged, empty, of another kind, or larger than the text
    encoder's; OSError."""
    config = read_object(folder / TOKENIZER_CONFIG)
    if (name := config.get("tokenizer_class", kind.name)) not in kind.classes:
        raise fault(folder / TOKENIZER_CONFIG, f": tokenizer_class: {shown(name)} is not supported ({kind.name} is)")
    convert(folder / TOKENIZER_CONFIG, config, _Config)
    if (folder / WHOLE).is_file():
        _check_whole(folder / WHOLE, kind, vocab_size)
    elif kind is CLIP_TOKENIZER:
        _check_vocab_and_merges(folder, vocab_size)
    else:
        _check_sentencepiece(folder / SENTENCEPIECE)


def max_prompt_tokens(folder: Path, most: int) -> int:
    """How long the tokenizer makes all prompts, of which the encoder takes `most` tokens. Raises CheckpointError."""
    length: Any = read_object(folder / TOKENIZER_CONFIG).get("model_max_length")
    if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length <= most:
        raise fault(
            folder / TOKENIZER_CONFIG,
            f": model_max_length must be 1 … {most} (max_position_embeddings of the text encoder), got {shown(length)}",
        )
    return length


def _check_whole(path: Path, kind: TokenizerKind, vocab_size: int) -> None:
    whole = decode(read_file(path), _Whole, path, _no_usable(kind))
    vocab = whole.model.vocab
    is_bpe = isinstance(vocab, dict)
    if whole.model.type not in (None, kind.model) or (vocab and is_bpe != (kind.model == "BPE")):
        found = whole.model.type or ("BPE" if is_bpe else "Unigram")
        raise fault(path, f"{_no_usable(kind)}: model.type is {shown(found)}, not {kind.model!r}")
    ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    _check_ids(path, kind, [*ids, *(added.id for added in whole.added_tokens)] if vocab else [], vocab_size)


def _check_vocab_and_merges(folder: Path, vocab_size: int) -> None:
    path = folder / "vocab.json"
    ids = decode(read_file(path), dict[str, _Id], path, _no_usable(CLIP_TOKENIZER))
    _check_ids(path, CLIP_TOKENIZER, list(ids.values()), vocab_size)
    merges = folder / "merges.txt"
    try:
        read_file(merges).decode()
    except UnicodeDecodeError as error:
        raise fault(merges, f"{_no_usable(CLIP_TOKENIZER)}: {error}") from None


def _check_sentencepiece(path: Path) -> None:
    """A worker converts it."""
    if not read_file(path):
        raise fault(path, f"{_no_usable(T5_TOKENIZER)}: it is empty")
    if missing := [package for module, package in CONVERSION.items() if not _is_installed(module)]:
        raise fault(
            path,
            f" takes {some_of(missing)} to be read without a {WHOLE} beside it, which is not installed:"
            f" pip install {' '.join(missing)}",
        )


def _check_ids(path: Path, kind: TokenizerKind, ids: list[int], vocab_size: int) -> None:
    if not ids:
        raise fault(path, f"{_no_usable(kind)}: its vocabulary is empty")
    if max(ids) >= vocab_size:
        raise fault(path, f" has a token {max(ids)}, its text encoder's config.json has vocab_size {vocab_size}")


def _no_usable(kind: TokenizerKind) -> str:
    return f" holds no usable {kind.name}"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it
        return False
