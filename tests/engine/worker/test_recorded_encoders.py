"""Recorded text encoders give what unrecorded ones give, and what a prompt got stays as it is."""

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.device_ops import DeviceOps
from tetrion.engine.models.registry import load_device_pipeline, model_components
from tetrion.engine.models.text_encoders import TextEncoders
from tetrion.engine.worker.recorded_encoders import RecordedEncoders
from tetrion.engine.worker.work_queue import CudaQueue, ImmediateQueue, Work, WorkQueue

PROMPTS = ("a red circle", "two words and some more of them", "", "a red circle")


class UnrecordingQueue(ImmediateQueue):
    def record(self, work: Work) -> Work:
        raise RuntimeError("this can't be recorded")


def encoders_of(spec: ModelSpec, queue: WorkQueue) -> TextEncoders:
    step = torch.zeros(1, dtype=torch.int32, device=queue.device)
    components = model_components(spec, "dummy")
    dtype = torch.float32 if queue.device.type == "cpu" else torch.bfloat16
    return load_device_pipeline(spec, "dummy", components, queue.device, dtype, DeviceOps(step)).text_encoders


@pytest.mark.parametrize(
    "make_queue", [ImmediateQueue, UnrecordingQueue, pytest.param(lambda: CudaQueue(0), marks=pytest.mark.gpu)]
)
def test_recorded_encoders_give_what_others_give(tiny_model: ModelSpec, make_queue: Callable[[], WorkQueue]) -> None:
    """On a GPU the bits are those of any other recording; cuBLAS has other workspace, hence other kernels, without."""
    queue = make_queue()
    encoders = encoders_of(tiny_model, queue)
    recorded, another = RecordedEncoders(encoders, queue), RecordedEncoders(encoders, queue)
    results = [recorded.encode(prompt) for prompt in PROMPTS]
    expected = [another.encode(prompt) for prompt in reversed(PROMPTS)][::-1]
    queue.drain()
    for prompt, result, same in zip(PROMPTS, results, expected, strict=True):
        assert torch.equal(result.embeds, same.embeds) and torch.equal(result.pooled, same.pooled)
        plain = encoders.encode(prompt)
        assert result.num_tokens == same.num_tokens == plain.num_tokens
        tolerance = 0.0 if queue.device.type == "cpu" else 0.02
        torch.testing.assert_close(result.embeds, plain.embeds, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(result.pooled, plain.pooled, rtol=tolerance, atol=tolerance)
    assert not torch.equal(results[0].embeds, results[1].embeds)


def test_encoders_that_cannot_be_recorded_are_told_of(tiny_model: ModelSpec, caplog: pytest.LogCaptureFixture) -> None:
    queue = UnrecordingQueue()
    RecordedEncoders(encoders_of(tiny_model, queue), queue)
    assert "not recorded" in caplog.text and "this can't be recorded" in caplog.text
