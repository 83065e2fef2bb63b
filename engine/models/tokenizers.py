"""Prompt -> token ids of a text encoder, always of one length.

Owns the way from a checkpoint's tokenizer folder to a `Tokenizer`. Worker-only: importing it takes seconds.
"""

from pathlib import Path
from typing import Protocol

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from tetrion.engine.model_spec import CheckpointError


class Tokenizer(Protocol):
    def ids(self, prompt: str, length: int) -> list[int]:
        """Exactly `length` ids: padded, or cut before the end mark."""

    def num_tokens(self, prompt: str) -> int:
        """The prompt's own tokens with all marks, before padding or cutting."""


class LibraryTokenizer:
    """A tokenizer of transformers. `do_lower_case` in its config is carried out here where the library does not: T5's
    class leaves it out."""

    def __init__(self, kind: type[PreTrainedTokenizerBase], folder: Path) -> None:
        """Raises CheckpointError if the folder holds none that can be used."""
        try:
            self._tokenizer = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # of a damaged file each library makes an error of its own
            raise CheckpointError(f"model: {str(folder)!r} holds no usable {kind.__name__}: {error}") from None
        self._lowers = self._tokenizer.init_kwargs.get("do_lower_case") is True

    def check_size(self, folder: Path, vocab_size: int) -> None:
        """Raises CheckpointError if there are more ids than the text encoder in `folder` has rows for."""
        last = max(self._tokenizer.get_vocab().values(), default=0)
        if last >= vocab_size:
            raise CheckpointError(
                f"model: {str(folder / 'config.json')!r}: vocab_size {vocab_size} has no token {last}, which its"
                " tokenizer has"
            )

    @property
    def model_max_length(self) -> int:
        return int(self._tokenizer.model_max_length)

    def ids(self, prompt: str, length: int) -> list[int]:
        return list(
            self._tokenizer(self._as_read(prompt), padding="max_length", max_length=length, truncation=True).input_ids
        )

    def num_tokens(self, prompt: str) -> int:
        return len(self._tokenizer(self._as_read(prompt), verbose=False).input_ids)

    def _as_read(self, prompt: str) -> str:
        return prompt.lower() if self._lowers else prompt
