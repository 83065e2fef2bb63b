"""Recorded text encoders give what unrecorded ones give, and what a prompt got stays as it is."""

from collections.abc import Callable
from typing import NoReturn

import pytest
import torch

from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.family import TextEncoding
from tetrion.engine.models.ops import ReferenceOps
from tetrion.engine.models.registry import all_components, load_on_device
from tetrion.engine.worker.recorded_encoders import RecordedEncoders
from tetrion.engine.worker.work_queue import CudaQueue, ImmediateQueue, Work, WorkQueue

PROMPTS = ("a red circle", "two words and some more of them", "", "a red circle")


class UnrecordingQueue(ImmediateQueue):
    def record(self, work: Work) -> NoReturn:
        raise RuntimeError("this can't be recorded")


def encoders_of(spec: ModelSpec, queue: WorkQueue) -> TextEncoding:
    on_cpu = queue.device.type == "cpu"
    ops = ReferenceOps(torch.zeros(1, dtype=torch.int32))
    if not on_cpu:
        pytest.importorskip("triton", reason="triton is not installed")
        from tetrion.engine.models.gpu_ops import GpuOps

        ops = GpuOps(torch.zeros(1, dtype=torch.int32, device=queue.device))
    dtype = torch.float32 if on_cpu else torch.bfloat16
    (model,) = load_on_device([spec], "dummy", all_components([spec], "dummy"), queue.device, dtype, ops)
    return model.text


@pytest.mark.parametrize(
    "make_queue", [ImmediateQueue, UnrecordingQueue, pytest.param(lambda: CudaQueue(0), marks=pytest.mark.gpu)]
)
def test_recorded_encoders_give_what_others_give(tiny_model: ModelSpec, make_queue: Callable[[], WorkQueue]) -> None:
    """On a GPU the bits are those of any other recording; cuBLAS has other workspace, hence other kernels, without."""
    queue = make_queue()
    with torch.no_grad():
        encoders = encoders_of(tiny_model, queue)
        recorded, another = RecordedEncoders(encoders, queue), RecordedEncoders(encoders, queue)
        results = [recorded.embedding(prompt) for prompt in PROMPTS]
        expected = [another.embedding(prompt) for prompt in reversed(PROMPTS)][::-1]
        queue.drain()
        tolerance = 0.0 if queue.device.type == "cpu" else 0.02
        for prompt, result, same in zip(PROMPTS, results, expected, strict=True):
            tokens = encoders.tokens(prompt)
            plain = encoders.embed([ids.to(queue.device) for ids in tokens.ids])
            assert result.num_tokens == same.num_tokens == tokens.num_tokens
            assert set(result.fields) == set(same.fields) == set(plain) == {"text", "pooled"}
            for name, tensor in result.fields.items():
                assert torch.equal(tensor, same.fields[name]), name
                torch.testing.assert_close(tensor, plain[name], rtol=tolerance, atol=tolerance)
    assert not torch.equal(results[0].fields["text"], results[1].fields["text"])


def test_fields_are_as_wide_as_a_slots(tiny_model: ModelSpec) -> None:
    with torch.no_grad():
        queue = ImmediateQueue()
        fields = RecordedEncoders(encoders_of(tiny_model, queue), queue).embedding("a red circle").fields
    for field in tiny_model.fields:
        if not field.changes:
            assert fields[field.name].shape == (tiny_model.max_rows(field.rows), field.width), field.name


def test_a_prompt_that_was_encoded_lately_is_not_encoded_again(tiny_model: ModelSpec) -> None:
    queue = ImmediateQueue()
    with torch.no_grad():
        recorded = RecordedEncoders(encoders_of(tiny_model, queue), queue)
        first = recorded.embedding("a red circle")
        recorded.embedding("a square")
        assert recorded.embedding("a red circle") is first


def test_encoders_that_cannot_be_recorded_are_told_of(tiny_model: ModelSpec, caplog: pytest.LogCaptureFixture) -> None:
    queue = UnrecordingQueue()
    with torch.no_grad():
        RecordedEncoders(encoders_of(tiny_model, queue), queue)
    assert "not recorded" in caplog.text and "this can't be recorded" in caplog.text
