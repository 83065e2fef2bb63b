"""Check and time every kernel on one GPU, attention beside cuDNN and FlashAttention; rows go to a JSON file.

    python -m benchmarks.gpu.kernels OUTPUT.json                      on a GPU, within 8 minutes
    TRITON_INTERPRET=1 python -m benchmarks.gpu.kernels OUTPUT.json   a rehearsal on the CPU with tiny shapes

On a GPU each call is captured in a CUDA graph of many repeats; the graphs of one comparison are replayed in turn
(A B C A B C …) and compared by medians. All members of a group are this one GPU: pushes show the kernels' own speed,
not the links'. The file is written after every section, so that a run cut short leaves what it has.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.runtime.errors import OutOfResources

from tetrion.engine.parallel.group import GroupPlan, plan_group
from tetrion.entrypoints.record import make_record, write_record
from tetrion.kernels import reference
from tetrion.kernels.attention import attention
from tetrion.kernels.attention_tiles import CANDIDATES, tile_for
from tetrion.kernels.barrier import CACHE_LINE, barrier
from tetrion.kernels.chunk_words import chunk_words, lanes_for
from tetrion.kernels.group_table import group_words
from tetrion.kernels.guided_step import guided_step
from tetrion.kernels.output_push import output_push
from tetrion.kernels.qk_norm_rope_push import Piece, qk_norm_rope_push
from tetrion.kernels.reference import Branch
from tetrion.kernels.residual_modulate import residual_modulate
from tetrion.kernels.slot_version import NUM_STATUS_WORDS

Row = dict[str, Any]
Calls = Mapping[str, Callable[[], object]]
GRAPH_MS, ROUNDS = 40.0, 7
CHECKED_ROWS = 128
BARRIERS = 100


class Shapes(NamedTuple):
    """What is run. FLUX.1's own numbers on a GPU, tiny ones for a rehearsal."""

    num_text: int
    num_image: tuple[int, ...]
    num_heads: int
    head_dim: int
    degrees: tuple[int, ...]


FLUX = Shapes(512, (256, 1024, 4096, 16384), 24, 128, (1, 2, 3, 4))
TINY = Shapes(10, (60,), 6, 32, (1, 2, 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--budget-s", type=float, default=450.0, help="no new measurement is begun after this")
    arguments = parser.parse_args()
    on_gpu = not triton.knobs.runtime.interpret
    shapes, deadline_s = (FLUX if on_gpu else TINY), time.monotonic() + arguments.budget_s
    rows: list[Row] = []
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(time.time_ns() % 2**32)
    with torch.device(device), torch.inference_mode():
        for section in (check_attention, time_attention, pushes, row_operators, steps, barriers, tune_attention):
            for row in section(shapes, device):
                rows.append(row)
                print(row, flush=True)
                if time.monotonic() > deadline_s:
                    rows.append({"kernel": section.__name__, "note": "cut short: out of time"})
                    break
            record = make_record(f"python -m benchmarks.gpu.kernels {shlex.join(sys.argv[1:])}", rows)
            record["host"] |= {
                "device": torch.cuda.get_device_name() if on_gpu else "cpu",
                "triton": triton.__version__,
            }
            write_record(record, arguments.output)


def median_ms(calls: Calls, device: torch.device) -> dict[str, float]:
    """Milliseconds of one call each, interleaved."""
    if device.type == "cpu":
        return {name: min(_seconds(call) for _ in range(2)) * 1e3 for name, call in calls.items()}
    graphs = {name: _graph(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, (graph, repeats) in graphs.items():
            times[name].append(_replay_ms(graph) / repeats)
    return {name: statistics.median(values) for name, values in times.items()}


def _graph(call: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of about GRAPH_MS of calls."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    repeats = max(3, min(400, int(GRAPH_MS / 1e3 / (time.perf_counter() - start))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    graph.replay()
    return graph, repeats


def _replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def check_attention(shapes: Shapes, device: torch.device) -> Iterator[Row]:
    """Errors of every system against fp32 on some rows, and whether the bits ignore the number of heads."""
    for num_image in shapes.num_image:
        for num_tokens in (shapes.num_text + num_image, shapes.num_text + num_image - 37):  # the latter: a partial tile
            q, k, v = _qkv(num_tokens, shapes.num_heads, shapes.head_dim)
            checked = torch.randperm(num_tokens, device="cpu").to(device)[:CHECKED_ROWS]
            expected = _rows_of_attention(q, k, v, checked)
            for name, call in _attention_calls(q, k, v, device).items():
                out = call()
                exact = True
                for heads in (shapes.num_heads // degree for degree in shapes.degrees):
                    part = _attention_calls(q[:, :heads], k[:, :heads], v[:, :heads], device)[name]()
                    exact = exact and torch.equal(part, out[:, :heads])
                yield {
                    "kernel": "attention",
                    "check": name,
                    "tokens": num_tokens,
                    "error": _error(out[checked], expected),
                    "exact_per_head": exact,
                }


def time_attention(shapes: Shapes, device: torch.device) -> Iterator[Row]:
    for num_tokens in (shapes.num_text + image for image in shapes.num_image):
        for num_heads in (shapes.num_heads // degree for degree in shapes.degrees):
            q, k, v = _qkv(num_tokens, num_heads, shapes.head_dim)
            times = median_ms(_attention_calls(q, k, v, device), device)
            for name, ms in times.items():
                yield _attention_row(name, q, ms) | {"speed_to_best_library": _best_library(times) / ms}


def tune_attention(shapes: Shapes, device: torch.device) -> Iterator[Row]:
    """Every candidate tile at the most and the fewest heads; the sum decides, since a tile must not know the heads."""
    for num_tokens in (shapes.num_text + image for image in shapes.num_image):
        for num_heads in (shapes.num_heads, shapes.num_heads // shapes.degrees[-1]):
            q, k, v = _qkv(num_tokens, num_heads, shapes.head_dim)
            out = torch.empty_like(q)
            chosen = tile_for(num_tokens, shapes.head_dim, q.element_size())
            for tile in dict.fromkeys((chosen, *CANDIDATES)):
                try:
                    ms = median_ms({"": partial(attention, q, k, v, out=out, tile=tile)}, device)[""]
                except OutOfResources as error:
                    yield {"kernel": "attention", "tile": list(tile), "tokens": num_tokens, "note": str(error)}
                else:
                    yield _attention_row("triton", q, ms) | {"tile": list(tile), "chosen": tile == chosen}


def _attention_calls(q: Tensor, k: Tensor, v: Tensor, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Every system's call; all take and give [L, h, D]."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    calls: dict[str, Callable[[], Tensor]] = {"triton": lambda: attention(q, k, v, out=out)}
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    for name, backend in (backends if device.type == "cuda" else {"math": SDPBackend.MATH}).items():
        calls[name] = partial(_library_attention, q, k, v, backend)
    return calls


def _library_attention(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
    q_1hLD, k_1hLD, v_1hLD = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q_1hLD, k_1hLD, v_1hLD).squeeze(0).transpose(0, 1)


def _attention_row(system: str, q: Tensor, ms: float) -> Row:
    num_tokens, num_heads, head_dim = q.shape
    return {
        "kernel": "attention",
        "system": system,
        "tokens": num_tokens,
        "heads": num_heads,
        "ms": ms,
        "tflops": 4 * num_tokens**2 * num_heads * head_dim / ms / 1e9,
    }


def _best_library(times: dict[str, float]) -> float:
    return min(ms for name, ms in times.items() if name != "triton")


def _rows_of_attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    scores = torch.einsum("lhd,mhd->hlm", q[rows].float(), k.float()) / q.shape[2] ** 0.5
    return torch.einsum("hlm,mhd->lhd", scores.softmax(-1), v.float())


def _qkv(num_tokens: int, num_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(num_tokens, num_heads, head_dim).bfloat16() for _ in range(3))
    return q, k, v


def _error(out: Tensor, expected: Tensor) -> float:
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


def group_tensors(plan: GroupPlan, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """A member's table, words of a chunk, and status, as the exchange has them."""
    me, part = plan.members[rank], plan.members
    segments = [[shard.rows[s] for shard in plan.shards] for s in range(len(plan.counts))]
    table = group_words(segments, [shard.heads for shard in plan.shards])
    who = {"part": part, "everyone": part, "partners": (me,)}
    lanes = lanes_for(max(part) + 1)
    state = {"slot": 0, "source": me, "start_version": 0, "end_version": 0, "start_buffer": 0, "end_buffer": 1}
    words = chunk_words(me, lanes, rows=range(0), **state, **who)
    as_words = partial(torch.tensor, dtype=torch.int32)
    return as_words(table), as_words(words), torch.zeros(NUM_STATUS_WORDS, dtype=torch.int32)


class Members:
    """A group whose members all are this device: slabs, their addresses, and rank 0's words."""

    def __init__(self, plan: GroupPlan, head_dim: int) -> None:
        self.plan = plan
        num_rows = max(sum(plan.counts), sum(plan.shape_of(plan.members[0]).padded))
        self.region = triton.cdiv(num_rows * plan.num_heads * head_dim * 2, 4096) * 4096
        self.slabs = [torch.full((4 * self.region,), 0xFF, dtype=torch.uint8) for _ in plan.members]
        self.bases = torch.tensor([slab.data_ptr() for slab in self.slabs])
        self.table, self.words, self.status = group_tensors(plan, 0)

    def view(self, rank: int, region: int, *shape: int) -> Tensor:
        start = region * self.region
        return self.slabs[rank][start : start + 2 * torch.Size(shape).numel()].view(torch.bfloat16).view(shape)


def pushes(shapes: Shapes, device: torch.device) -> Iterator[Row]:
    """Rank 0's pushes, beside a plain copy of the same bytes."""
    for num_image in shapes.num_image:
        for degree in shapes.degrees:
            plan = plan_group(tuple(range(degree)), (shapes.num_text, num_image), shapes.num_heads)
            members = Members(plan, shapes.head_dim)
            yield from _qkv_push(members, shapes, device)
            yield from _output_push(members, shapes, device)


def _qkv_push(members: Members, shapes: Shapes, device: torch.device) -> Iterator[Row]:
    plan, head_dim = members.plan, shapes.head_dim
    shard, width = plan.shards[0], plan.num_heads * head_dim
    norms = torch.rand(4, head_dim).bfloat16()
    num_rows = sum(plan.counts)
    angles = torch.randn(num_rows, head_dim // 2)
    cos, sin = angles.cos(), angles.sin()
    pieces = [
        Piece(torch.randn(len(rows), 3 * width).bfloat16(), segment, norms[2 * segment], norms[2 * segment + 1])
        for segment, rows in enumerate(shard.rows)
    ]

    def push() -> None:
        qk_norm_rope_push(
            pieces,
            (cos, sin),
            members.table,
            members.words,
            members.status,
            members.bases,
            (0, members.region, 2 * members.region),
            degree=plan.degree,
            num_heads=plan.num_heads,
            head_dim=head_dim,
        )

    push()
    errors = []
    for (qkv, _, q_norm, k_norm, *_), rows in zip(pieces, plan.canonical_rows(shard), strict=True):
        rope = tuple(x[rows.start : rows.stop].repeat_interleave(2, dim=1) for x in (cos, sin))
        heads_of_rows = qkv.float().unflatten(1, (3, plan.num_heads, head_dim))
        expected = reference.qk_norm_rope(heads_of_rows, q_norm.float(), k_norm.float(), (rope[0], rope[1]))
        for peer in plan.shards:
            heads = slice(peer.heads.start, peer.heads.stop)
            for region, part in enumerate(expected):
                whole = members.view(peer.rank, region, num_rows, len(peer.heads), head_dim)
                errors.append(_error(whole[rows.start : rows.stop], part[:, heads]))
    source = torch.cat([piece.qkv for piece in pieces])
    target = torch.empty_like(source)
    times = median_ms({"push": push, "copy": lambda: target.copy_(source)}, device)
    yield _push_row("qk_norm_rope_push", plan, times, source) | {"error": max(errors)}


def _output_push(members: Members, shapes: Shapes, device: torch.device) -> Iterator[Row]:
    plan, shard = members.plan, members.plan.shards[0]
    padded, over = plan.shape_of(shard.device_id).padded, range(len(plan.counts))
    output = torch.randn(sum(plan.counts), len(shard.heads), shapes.head_dim).bfloat16()

    def push() -> None:
        output_push(
            output,
            over,
            padded,
            members.table,
            members.words,
            members.status,
            members.bases,
            3 * members.region,
            degree=plan.degree,
            num_heads=plan.num_heads,
        )

    push()
    equal = True
    for peer in plan.shards:
        region = members.view(peer.rank, 3, sum(padded), plan.num_heads, shapes.head_dim)[:, : len(shard.heads)]
        for part, rows in zip(region.split(list(padded)), plan.canonical_rows(peer), strict=True):
            equal = equal and torch.equal(part[: len(rows)], output[rows.start : rows.stop])
    target = torch.empty_like(output)
    times = median_ms({"push": push, "copy": lambda: target.copy_(output)}, device)
    yield _push_row("output_push", plan, times, output) | {"equal": equal}


def _push_row(kernel: str, plan: GroupPlan, times: dict[str, float], source: Tensor) -> Row:
    """GB/s counts the bytes stored."""
    speed = source.numel() * source.element_size() / times["push"] / 1e6
    shape = {"tokens": sum(plan.counts), "degree": plan.degree}
    return {"kernel": kernel, **shape, "ms": times["push"], "copy_ms": times["copy"], "gb_per_s": speed}


def row_operators(shapes: Shapes, device: torch.device) -> Iterator[Row]:
    """Elementwise kernels beside eager PyTorch, GB/s of bytes read and written."""
    width = shapes.num_heads * shapes.head_dim
    for num_rows in (shapes.num_text + image for image in shapes.num_image):
        x, y = (torch.randn(num_rows, width).bfloat16() for _ in range(2))
        shift, scale, gate = torch.randn(3, width).div(8).bfloat16()
        split = (shapes.num_text, num_rows - shapes.num_text)
        branches = [
            Branch(x_part, shift, scale, gate, y_part)
            for x_part, y_part in zip(x.split(split), y.clone().split(split), strict=True)
        ]
        total = reference.gated_residual(x.float(), gate.float(), y.float())
        normed = torch.cat([normed for _, normed in residual_modulate(branches)])
        error = _error(normed, reference.modulate(total, shift.float(), scale.float()))
        calls: Calls = {
            "ours": partial(residual_modulate, branches),
            "eager": partial(reference.residual_modulate, branches),
        }
        yield _row_of("residual_modulate", x, 4, error, median_ms(calls, device))


def steps(shapes: Shapes, device: torch.device) -> Iterator[Row]:
    """The tail of a step of 64 channels, Euler's without guidance and with it, and a solver of 4 rows with it."""
    for num_rows in shapes.num_image:
        for num_state, num_branches in ((1, 1), (1, 2), (4, 2)):
            state = torch.randn(num_rows, num_state * 64)
            velocities = [torch.randn(num_rows, 64).bfloat16() for _ in range(num_branches)]
            coefficients, guidance = torch.randn(1, num_state, num_state + 1), torch.full((1,), 4.5)
            step = torch.zeros(1, dtype=torch.int32)
            ours = partial(guided_step, state, velocities, coefficients, guidance, step)
            eager = partial(reference.guided_step, state, velocities, coefficients[0].cpu(), 4.5)
            times = median_ms({"ours": ours, "eager": eager}, device)
            tensors = 2 + num_branches / (2 * num_state)  # in bytes, velocities have half of fp32's
            row = _row_of("guided_step", state, tensors, _error(ours(), eager()), times)
            yield row | {"state_rows": num_state, "branches": num_branches}


def _row_of(kernel: str, x: Tensor, num_tensors: float, error: float, times: dict[str, float]) -> Row:
    """`num_tensors`: as large as x, read or written."""
    speed = num_tensors * x.numel() * x.element_size() / times["ours"] / 1e6
    shape = {"rows": x.shape[0], "width": x.shape[1]}
    return {
        "kernel": kernel,
        **shape,
        "ms": times["ours"],
        "eager_ms": times["eager"],
        "gb_per_s": speed,
        "error": error,
    }


def barriers(shapes: Shapes, device: torch.device) -> Iterator[Row]:
    """µs of one barrier among 1, 2 and 4 "devices", streams of this GPU (on a CPU: of one device alone)."""
    for degree in (1, 2, 4) if device.type == "cuda" else (1,):
        lanes = lanes_for(degree)
        slabs = torch.zeros(degree, degree * CACHE_LINE // 4, dtype=torch.int32)
        bases = torch.tensor([slab.data_ptr() for slab in slabs])
        expected, status = torch.zeros(degree, degree, dtype=torch.int32), torch.zeros(degree, 1, dtype=torch.int32)
        abort = torch.zeros(degree, 1, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
        members = [[*range(degree), *[me] * (lanes - degree)] for me in range(degree)]
        meetings = [
            partial(barrier, words, bases, *state, device_id=me)
            for me, (words, *state) in enumerate(
                zip(torch.tensor(members, dtype=torch.int32), expected, abort, status, strict=True)
            )
        ]
        if device.type == "cpu":
            us = _seconds(meetings[0]) * 1e6
        else:
            slabs.fill_(1)  # the first barrier, which loads the kernel, must not wait
            meetings[0]()
            torch.cuda.synchronize()
            for counts in (slabs, expected):
                counts.zero_()
            us = _meeting_us(meetings)
        yield {"kernel": "barrier", "degree": degree, "us": us, "aborted": int(status.sum())}


def _meeting_us(devices: Sequence[Callable[[], None]]) -> float:
    graphs = [torch.cuda.CUDAGraph() for _ in devices]
    for meet, graph in zip(devices, graphs, strict=True):
        with torch.cuda.graph(graph):
            for _ in range(BARRIERS):
                meet()
    streams = [torch.cuda.Stream() for _ in devices]
    torch.cuda.synchronize()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / BARRIERS * 1e6)
    return statistics.median(times)


if __name__ == "__main__":
    main()
