"""Token ids without tokenizer files, for measuring without a checkpoint (`load_format: dummy`)."""

import hashlib


class HashTokenizer:
    """One id a word, from a hash of the word. `end`: the end mark's id."""

    def __init__(self, vocabulary: int, end: int, start: int | None = None, padding: int = 0) -> None:
        self._vocabulary, self._end, self._padding = vocabulary, end, padding
        self._start = [] if start is None else [start]

    def ids(self, prompt: str, length: int) -> list[int]:
        """Exactly `length` ids: start mark if there is one, words, end mark, padding; what is too long is cut."""
        words = self._words(prompt)[: length - 1 - len(self._start)]
        ids = [*self._start, *words, self._end]
        return ids + [self._padding] * (length - len(ids))

    def num_tokens(self, prompt: str) -> int:
        return len(self._start) + len(self._words(prompt)) + 1

    def _words(self, prompt: str) -> list[int]:
        """Ids from 3 on, and below the marks that stand at a vocabulary's end."""
        return [3 + hashed(word) % max(1, self._vocabulary - 6) for word in prompt.split()]


def hashed(text: str) -> int:
    """56 bits."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
