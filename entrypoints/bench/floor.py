"""The library floor of one denoising step on one device of a group: its GEMMs and attention at their own shapes, alone.

No norms, no exchange, no launches in between (one CUDA graph): what an engine that hides everything else could reach
with today's libraries (cuBLAS, cuDNN). Runs in a process of its own, which `FloorProcess` drives: answers
`{"num_text", "num_image", "degree"}` by preparing that shape, `{"seconds"}` with `{"ms"}`, the time of each step.

Arguments: the transformer's config file, the device's name.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tetrion.entrypoints.bench.line_process import Message, answer_lines

NUM_WEIGHTS = 4
"""Tensors of one shape that take turns, so that weights do not stay in a cache from layer to layer."""
MLP_RATIO = 4
IN_FLIGHT = 8
"""Steps that are queued before the host waits."""


class Gemm(NamedTuple):
    """[rows, inputs] @ [outputs, inputs]^T + bias."""

    rows: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs


class Attention(NamedTuple):
    tokens: int
    heads: int
    head_dim: int

    @property
    def flops(self) -> int:
        return 4 * self.tokens**2 * self.heads * self.head_dim


Operator = Gemm | Attention


def step_operators(config: dict[str, Any], num_text: int, num_image: int, degree: int) -> list[Operator]:
    """What the device with most tokens computes in a step of a FLUX.1 transformer, in order.

    Projections of q, k and v are one GEMM, and a single block's MLP belongs to it: the best that the libraries can be
    given. Modulations and the first and last projection are left out.
    """
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    width, hidden = heads * head_dim, MLP_RATIO * heads * head_dim
    text, image = -(-num_text // degree), -(-num_image // degree)
    attention = Attention(num_text + num_image, -(-heads // degree), head_dim)
    double: list[Operator] = [Gemm(rows, width, 3 * width) for rows in (image, text)]
    double.append(attention)
    for rows in (image, text):
        double += [Gemm(rows, width, width), Gemm(rows, width, hidden), Gemm(rows, hidden, width)]
    both = text + image
    single = [Gemm(both, width, 3 * width + hidden), attention, Gemm(both, width + hidden, width)]
    return double * config["num_layers"] + single * config["num_single_layers"]


class Floor:
    """Runs the operators of one shape at a time."""

    def __init__(self, config: dict[str, Any], device: torch.device) -> None:
        self._config, self._device = config, device
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._step: Callable[[], object] | None = None

    def prepare(self, num_text: int, num_image: int, degree: int) -> None:
        self._step = None  # the previous shape's memory, for the workers of the same GPU too
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        operators = step_operators(self._config, num_text, num_image, degree)
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
                case Attention(tokens, heads, head_dim):
                    q, k, v = some(1, heads, tokens, head_dim, count=3)
                    calls.append(partial(_attend, q, k, v))
        return calls


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if q.is_cuda else SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


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
    config, device = json.loads(Path(sys.argv[1]).read_text()), torch.device(sys.argv[2])
    torch.set_grad_enabled(False)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    floor = Floor(config, device)

    def answer(question: Message) -> Message:
        if "seconds" in question:
            return {"ms": floor.run(question["seconds"])}
        floor.prepare(question["num_text"], question["num_image"], question["degree"])
        return {}

    answer_lines(answer)


if __name__ == "__main__":
    main()
