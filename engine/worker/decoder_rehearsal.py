"""So that a decoder's first picture of a size is as quick as the next one.

For each new size libraries choose kernels, convolution by convolution, which takes longer than the decoding of a small
picture. Here they do it while the device is at the picture's steps.
"""

import logging
from collections import OrderedDict

import torch
from torch import Tensor

from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.family import LatentCodec, Picture
from tetrion.engine.models.memory_budget import decode_bytes
from tetrion.engine.shape import StepShape
from tetrion.engine.worker.work_queue import WorkQueue

logger = logging.getLogger(__name__)
KNOWN_SIZES = 4096


class DecoderRehearsal:
    def __init__(self, codec: LatentCodec, spec: ModelSpec, queue: WorkQueue) -> None:
        self._codec, self._width, self._queue = codec, spec.latents.width, queue
        self._known: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._expected: dict[tuple[int, int], StepShape] = {}

    @property
    def has_to_rehearse(self) -> bool:
        return bool(self._expected)

    def decode(self, latents: Tensor, shape: StepShape) -> Picture:
        self._note(shape)
        self._expected.pop((shape.width, shape.height), None)
        return self._codec.decode(latents, shape)

    def expect(self, shape: StepShape) -> None:
        """Such a picture is to be decoded later."""
        if self._note(shape):
            self._expected[shape.width, shape.height] = shape

    def rehearse(self) -> None:
        """One of the sizes that are expected and new. Nothing happens if there is little memory."""
        shape = self._expected.pop(next(iter(self._expected)))

        def decode() -> None:
            self._codec.decode(torch.zeros(shape.image, self._width, device=self._queue.device), shape)

        try:
            self._queue.rehearse(decode, decode_bytes(min(shape.width * shape.height, self._codec.whole_pixels)))
        except RuntimeError as error:
            logger.warning("decoding %d × %d was not rehearsed: %s", shape.width, shape.height, error)

    def _note(self, shape: StepShape) -> bool:
        """Whether the size is new."""
        size = shape.width, shape.height
        is_new = size not in self._known
        self._known[size] = None
        self._known.move_to_end(size)
        if len(self._known) > KNOWN_SIZES:
            self._known.popitem(last=False)
        return is_new
