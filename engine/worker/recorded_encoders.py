"""The text encoders as one recorded piece of work: hundreds of small launches become one.

Owns the ids' place on the device, which the recording reads. Everything is enqueued.
"""

import functools
import logging
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tetrion.engine.models.family import TextEncoding
from tetrion.engine.worker.work_queue import Work, WorkQueue

logger = logging.getLogger(__name__)
CACHED_PROMPTS = 64


class Embedding(NamedTuple):
    """A prompt's fields of a slot, on the device, and how many tokens it has of its own."""

    fields: Mapping[str, Tensor]
    num_tokens: int


class RecordedEncoders:
    """`embedding`: of recent prompts; everything is enqueued."""

    def __init__(self, encoders: TextEncoding, queue: WorkQueue) -> None:
        """Runs the encoders once and records them; where they can't be recorded, they go on running unrecorded."""
        self._encoders, self._queue = encoders, queue
        self._ids = tuple(torch.empty_like(ids, device=queue.device) for ids in encoders.tokens("").ids)
        self._result: dict[str, Tensor] = {}
        self._work: Work = self._embed
        self.embedding = functools.lru_cache(CACHED_PROMPTS)(self._encode)
        self._encode("")
        queue.drain()
        try:
            recording = queue.record(self._embed)
            recording()
            self._work = recording
        except RuntimeError as error:
            logger.warning("the text encoders are not recorded, encoding is slower: %s", error)

    def _encode(self, prompt: str) -> Embedding:
        tokens = self._encoders.tokens(prompt)
        for place, ids in zip(self._ids, tokens.ids, strict=True):
            place.copy_(self._queue.to_device(ids))
        self._work()
        return Embedding({name: tensor.clone() for name, tensor in self._result.items()}, tokens.num_tokens)

    def _embed(self) -> None:
        self._result = self._encoders.embed(self._ids)
