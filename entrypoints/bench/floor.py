"""The library floor of one denoising step on one device of a group: its GEMMs and attention at their own shapes, alone.

No norms, no exchange, no launches in between (one CUDA graph): what an engine that hides everything else could reach
with today's libraries (cuBLAS, cuDNN). Which they are comes from the family's own forward pass (models/recording.py).
Runs in a process of its own, which the step benchmark drives: answers `{"shape", "degree"}` by preparing one branch's
pass at that degree, `{"seconds"}` with `{"ms"}`, the time of each pass.

Arguments: the model's spec as JSON, the device's name.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.recording import Attention, Gemm, Operator, step_operators
from tetrion.engine.shape import StepShape
from tetrion.entrypoints.bench.line_process import Message, answer_lines

NUM_WEIGHTS = 4
"""Tensors of one shape that take turns, so that weights do not stay in a cache from layer to layer."""
IN_FLIGHT = 8
"""Steps that are queued before the host waits."""


class Floor:
    """Runs the operators of one shape at a time."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self._spec, self._device = spec, device
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._step: Callable[[], object] | None = None

    def prepare(self, shape: StepShape, degree: int) -> None:
        self._step = None  # the previous shape's memory, for the workers of the same GPU too
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        operators = step_operators(self._spec, shape, degree)
        calls = self._calls(operators)

        def step() -> None:
            for call in calls:
                call()

        self._step = _graph(step) if self._device.type == "cuda" else step

    def run(self, seconds: float) -> list[float]:
        """Milliseconds of each step, one after the other for at least so long."""
        assert self._step is not None, "prepare a shape first"
        times: list[float] = []
        until_s = time.perf_counter() + seconds
        while not times or time.perf_counter() < until_s:
            times += _cuda_ms(self._step) if self._device.type == "cuda" else _cpu_ms(self._step)
        return times

    def _calls(self, operators: list[Operator]) -> list[Callable[[], object]]:
        tensors: dict[tuple[int, ...], list[Tensor]] = {}

        def some(*shape: int, count: int) -> list[Tensor]:
            key = count, *shape  # activations and weights of one shape differ in number
            if key not in tensors:
                tensors[key] = [torch.randn(shape, device=self._device, dtype=self._dtype) for _ in range(count)]
            return tensors[key]

        calls: list[Callable[[], object]] = []
        for i, operator in enumerate(operators):
            match operator:
                case Gemm(rows, inputs, outputs):
                    x, bias = some(rows, inputs, count=2)[i % 2], some(outputs, count=1)[0]
                    weight = some(outputs, inputs, count=NUM_WEIGHTS)[i % NUM_WEIGHTS]
                    calls.append(partial(F.linear, x, weight, bias))
                case Attention(tokens, heads, head_dim, heads_per_key, prefix):
                    q, *_ = some(1, heads, tokens, head_dim, count=3)
                    *_, k, v = some(1, heads // heads_per_key, tokens + prefix, head_dim, count=3)
                    calls.append(partial(_attend, q, k, v))
        return calls


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if q.is_cuda else SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def _graph(step: Callable[[], object]) -> Callable[[], object]:
    step()  # libraries choose their kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _cuda_ms(step: Callable[[], object]) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(IN_FLIGHT + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    marks[-1].synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(marks)]


def _cpu_ms(step: Callable[[], object]) -> list[float]:
    started_s = time.perf_counter()
    step()
    return [1e3 * (time.perf_counter() - started_s)]


def main() -> None:
    spec, device = msgspec.json.decode(sys.argv[1], type=ModelSpec), torch.device(sys.argv[2])
    torch.set_grad_enabled(False)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    floor = Floor(spec, device)

    def answer(question: Message) -> Message:
        if "seconds" in question:
            return {"ms": floor.run(question["seconds"])}
        floor.prepare(msgspec.convert(question["shape"], StepShape), question["degree"])
        return {}

    answer_lines(answer)


if __name__ == "__main__":
    main()
