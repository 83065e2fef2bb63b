"""The text encoders as one recorded piece of work: hundreds of small launches become one.

Owns the ids' place on the device, which the recording reads. Everything is enqueued.
"""

import logging

import torch
from torch import Tensor

from tetrion.engine.models.text_encoders import PromptEmbedding, TextEncoders
from tetrion.engine.worker.work_queue import WorkQueue

logger = logging.getLogger(__name__)


class RecordedEncoders:
    def __init__(self, encoders: TextEncoders, queue: WorkQueue) -> None:
        """Runs the encoders once and records them; where they can't be recorded, they go on running unrecorded."""
        self._encoders, self._queue = encoders, queue
        tokens = encoders.tokens("")
        self._clip_ids, self._t5_ids = (torch.empty_like(ids, device=queue.device) for ids in (tokens.clip, tokens.t5))
        self._result: tuple[Tensor, Tensor] | None = None
        self._work = self._embed
        self.encode("")
        queue.drain()
        try:
            self._work = queue.record(self._embed)
        except RuntimeError as error:
            logger.warning("the text encoders are not recorded, encoding is slower: %s", error)

    def encode(self, prompt: str) -> PromptEmbedding:
        """As `TextEncoders.encode`, without waiting for the device."""
        tokens = self._encoders.tokens(prompt)
        self._clip_ids.copy_(self._queue.to_device(tokens.clip))
        self._t5_ids.copy_(self._queue.to_device(tokens.t5))
        self._work()
        assert self._result is not None
        embeds, pooled = self._result
        return PromptEmbedding(embeds=embeds.clone(), pooled=pooled.clone(), num_tokens=tokens.num_tokens)

    def _embed(self) -> None:
        self._result = self._encoders.embed(self._clip_ids, self._t5_ids)
