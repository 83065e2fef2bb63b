"""A size is rehearsed once, before its first picture is decoded, and only while nothing else is to be done."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tetrion.engine.messages import Command, Ping, Shutdown
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.family import LatentCodec, Picture
from tetrion.engine.models.memory_budget import decode_bytes
from tetrion.engine.shape import StepShape
from tetrion.engine.worker import decoder_rehearsal
from tetrion.engine.worker.decoder_rehearsal import DecoderRehearsal
from tetrion.engine.worker.entry import IDLE_S, serve
from tetrion.engine.worker.work_queue import ImmediateQueue


class Codec:
    """Notes what it is to decode. `whole_pixels`: as `LatentCodec`."""

    def __init__(self, whole_pixels: float = float("inf")) -> None:
        self.sizes: list[tuple[int, int]] = []
        self.whole_pixels = whole_pixels

    def decode(self, latents: Tensor, shape: StepShape) -> Picture:
        assert len(latents) == shape.image
        self.sizes.append((shape.width, shape.height))
        return Picture(torch.zeros(shape.height, shape.width, 3, dtype=torch.uint8), torch.tensor(True))


class RehearsingQueue(ImmediateQueue):
    """Runs what is rehearsed, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.num_bytes: list[int] = []
        self._error = error

    def rehearse(self, work: Callable[[], None], num_bytes: int) -> None:
        self.num_bytes.append(num_bytes)
        if self._error is not None:
            raise self._error
        work()


def rehearsal_of(spec: ModelSpec, codec: Codec, queue: RehearsingQueue) -> DecoderRehearsal:
    return DecoderRehearsal(cast(LatentCodec, codec), spec, queue)


def test_each_size_is_rehearsed_once(tiny_model: ModelSpec) -> None:
    codec, queue = Codec(), RehearsingQueue()
    rehearsal = rehearsal_of(tiny_model, codec, queue)
    assert not rehearsal.has_to_rehearse
    small, wide = tiny_model.shape(8, 8), tiny_model.shape(20, 8)
    for shape in (small, wide, small, tiny_model.shape(20, 8, 2)):
        rehearsal.expect(shape)
    while rehearsal.has_to_rehearse:
        rehearsal.rehearse()
    rehearsal.expect(wide)
    assert not rehearsal.has_to_rehearse
    assert codec.sizes == [(8, 8), (20, 8)]
    assert queue.num_bytes == [decode_bytes(64), decode_bytes(160)]


def test_what_has_been_decoded_is_not_rehearsed(tiny_model: ModelSpec) -> None:
    codec = Codec()
    rehearsal = rehearsal_of(tiny_model, codec, RehearsingQueue())
    shape = tiny_model.shape(8, 8)
    rehearsal.expect(shape)
    rehearsal.decode(torch.zeros(shape.image, 1), shape)
    assert not rehearsal.has_to_rehearse
    rehearsal.expect(shape)
    assert not rehearsal.has_to_rehearse and codec.sizes == [(8, 8)]


def test_memory_is_asked_for_no_more_than_decoding_takes(tiny_model: ModelSpec) -> None:
    queue = RehearsingQueue()
    rehearsal = rehearsal_of(tiny_model, Codec(whole_pixels=100), queue)
    rehearsal.expect(tiny_model.shape(20, 8))
    rehearsal.rehearse()
    assert queue.num_bytes == [decode_bytes(100)], "the picture is decoded in tiles"


def test_a_rehearsal_that_fails_harms_nobody(tiny_model: ModelSpec, caplog: pytest.LogCaptureFixture) -> None:
    rehearsal = rehearsal_of(tiny_model, Codec(), RehearsingQueue(RuntimeError("no such kernel")))
    rehearsal.expect(tiny_model.shape(8, 8))
    rehearsal.rehearse()
    assert "8 × 8" in caplog.text and "no such kernel" in caplog.text
    assert not rehearsal.has_to_rehearse


def test_sizes_of_long_ago_are_forgotten(tiny_model: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_rehearsal, "KNOWN_SIZES", 2)
    codec = Codec()
    rehearsal = rehearsal_of(tiny_model, codec, RehearsingQueue())
    for size in ((8, 8), (20, 8), (8, 8), (8, 20), (8, 8), (20, 8)):
        rehearsal.expect(tiny_model.shape(*size))
        while rehearsal.has_to_rehearse:
            rehearsal.rehearse()
    assert codec.sizes == [(8, 8), (20, 8), (8, 20), (20, 8)]


def test_a_worker_rehearses_when_no_command_comes() -> None:
    script: Iterator[Command | None] = iter(
        [Ping(command_id=1), None, None, Ping(command_id=2), Shutdown(command_id=3)]
    )
    waits, done = [], []

    def receive(timeout_s: float | None) -> Command | None:
        waits.append(timeout_s)
        return next(script)

    runner = SimpleNamespace(has_to_rehearse=True, rehearse=lambda: done.append("rehearsed"))

    def send(event: Any) -> None:
        done.append(event.command_id)
        runner.has_to_rehearse = event.command_id < 2

    serve(cast(Any, runner), 0, receive, send)
    assert done == [1, "rehearsed", "rehearsed", 2]
    assert waits == [IDLE_S] * 4 + [None]
