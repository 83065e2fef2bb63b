"""A few int32 words from Python to device memory, in the order of the stream, without waiting for it.

Owns the pinned memory that asynchronous copies read from: a ring of rows, each used again only after its copy is done.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

NUM_ROWS = 64


class WordUpload:
    """One stream's uploads; not for several threads. `max_words`: the most of one upload."""

    def __init__(self, device: torch.device, max_words: int) -> None:
        self._on_gpu = device.type == "cuda"
        self._rows = torch.zeros(NUM_ROWS, max_words, dtype=torch.int32, pin_memory=self._on_gpu)
        self._copied = [torch.cuda.Event() for _ in range(NUM_ROWS)] if self._on_gpu else []
        self._next = 0

    def copy(self, words: Sequence[int], target: Tensor) -> None:
        """Enqueue: target[:len(words)] = words. Waits only if NUM_ROWS copies are still to be done."""
        index, self._next = self._next, (self._next + 1) % NUM_ROWS
        row = self._rows[index, : len(words)]
        if self._on_gpu:
            self._copied[index].synchronize()
        row.copy_(torch.tensor(words, dtype=torch.int32))
        target[: len(words)].copy_(row, non_blocking=True)
        if self._on_gpu:
            self._copied[index].record()
