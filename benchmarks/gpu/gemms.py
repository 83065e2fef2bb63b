"""The step's GEMMs and attention one by one: do rows depend on the degree, and which way of calling is faster.

    python -m benchmarks.gpu.gemms OUTPUT.json                      on a GPU, about a minute
    TRITON_INTERPRET=1 python -m benchmarks.gpu.gemms OUTPUT.json   a rehearsal on the CPU with tiny shapes

Rows with `identical`: an operator's results for one member's rows (or heads) of every degree, against those for all
rows at once; where it is false, that operator breaks the promise that the degree does not show in a picture. Rows with
`ms`: ways of computing the same, interleaved: a single block's q, k, v and MLP as two GEMMs or one, its output as two
GEMMs or as one whose input must be put together first. The file is written after every size.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from benchmarks.gpu.kernels import FLUX, TINY, Calls, Row, Shapes, median_ms
from tetrion.engine.models.gpu_ops import GpuOps
from tetrion.engine.models.ops import Linear
from tetrion.engine.parallel.group import plan_group, split
from tetrion.entrypoints.record import make_record, write_record
from tetrion.kernels.attention_backend import attend

NARROW = 64
MORE_DEGREES = (6, 8)
"""Of groups that one GPU stands in for, where only bits are compared."""
NUM_WEIGHTS = 4
"""Layers that take turns where ways are timed, so that weights do not stay in a cache."""


class Layers(NamedTuple):
    """A block's weights; `both` is `qkv` and `mlp_in` in one."""

    qkv: Linear
    out: Linear
    mlp_in: Linear
    mlp_out: Linear
    joined: Linear
    both: Linear
    final: Linear


def layers(width: int, dtype: torch.dtype) -> Layers:
    def layer(num_out: int, num_in: int) -> Linear:
        return Linear(torch.randn(num_out, num_in, dtype=dtype) / num_in**0.5, torch.randn(num_out, dtype=dtype))

    sizes = ((3, 1), (1, 1), (4, 1), (1, 4), (1, 5), (7, 1))
    made = [layer(num_out * width, num_in * width) for num_out, num_in in sizes]
    return Layers(*made, final=layer(NARROW, width))


def row_exactness(shapes: Shapes, num_image: int, weights: Layers, dtype: torch.dtype) -> Iterator[Row]:
    """Every operator on each member's rows of text, image or both."""
    width = shapes.num_heads * shapes.head_dim
    ops = GpuOps(torch.zeros(1, dtype=torch.int32))
    x = torch.randn(shapes.num_text + num_image, width, dtype=dtype)
    hidden = torch.randn(len(x), 4 * width, dtype=dtype)
    text, image = slice(0, shapes.num_text), slice(shapes.num_text, len(x))
    operators: dict[str, Callable[[Tensor], Tensor]] = {
        "qkv": lambda rows: ops.linear(x[rows], weights.qkv),
        "out": lambda rows: ops.linear(x[rows], weights.out),
        "mlp_in": lambda rows: ops.gelu_linear(x[rows], weights.mlp_in),
        "mlp_out": lambda rows: ops.linear(hidden[rows], weights.mlp_out),
        "joined": lambda rows: ops.joined_linear(x[rows], hidden[rows], weights.joined),
        "final": lambda rows: ops.narrow_linear(x[rows], weights.final),
    }
    streams = {"text": text, "image": image, "both": slice(0, len(x))}
    of_block = {
        "joined": ("both",),
        "final": ("image",),
        "out": ("text", "image"),
        "mlp_out": ("text", "image"),
    }
    for name, operator in operators.items():
        for stream in of_block.get(name, tuple(streams)):
            all_rows = torch.arange(len(x))[streams[stream]]
            whole = operator(all_rows)
            for degree in exact_degrees(shapes):
                plan = plan_group(tuple(range(degree)), (shapes.num_text, num_image), shapes.num_heads)
                held = [_held(plan.canonical_rows(shard), stream) for shard in plan.shards]
                first = int(all_rows[0])
                identical = all(torch.equal(operator(rows), whole[rows - first]) for rows in held)
                rows_held = [len(rows) for rows in held]
                yield {"operator": name, "rows_of": stream, "degree": degree, "rows": rows_held, "identical": identical}


def _held(rows: tuple[range, ...], stream: str) -> Tensor:
    """Of a member's text and image rows those of a stream, in canonical numbers."""
    text, image = (torch.arange(part.start, part.stop) for part in rows)
    return {"text": text, "image": image, "both": torch.cat([text, image])}[stream]


def head_exactness(shapes: Shapes, num_image: int, dtype: torch.dtype) -> Iterator[Row]:
    """Attention of each member's heads."""
    shape = shapes.num_text + num_image, shapes.num_heads, shapes.head_dim
    q, k, v = (torch.randn(shape, dtype=dtype) for _ in range(3))
    whole = attend(q, k, v)
    for degree in exact_degrees(shapes):
        parts = [slice(heads.start, heads.stop) for heads in split(shapes.num_heads, degree)]
        identical = all(
            torch.equal(attend(*(x[:, part].contiguous() for x in (q, k, v))), whole[:, part]) for part in parts
        )
        yield {"operator": "attention", "rows_of": "heads", "degree": degree, "identical": identical}


def exact_degrees(shapes: Shapes) -> list[int]:
    return [degree for degree in (*shapes.degrees, *MORE_DEGREES) if degree <= shapes.num_heads]


def ways(shapes: Shapes, num_image: int, turns: list[Layers], dtype: torch.dtype) -> Iterator[Row]:
    """Milliseconds of the ways to compute a single block's projections, at every degree."""
    width, device = shapes.num_heads * shapes.head_dim, turns[0].out.weight.device
    ops = GpuOps(torch.zeros(1, dtype=torch.int32))
    for degree in shapes.degrees:
        num_rows = -(-shapes.num_text // degree) + -(-num_image // degree)
        x, hidden = torch.randn(num_rows, width, dtype=dtype), torch.randn(num_rows, 4 * width, dtype=dtype)
        joined = torch.cat([x, hidden], dim=1)

        def two_gemms(x: Tensor = x) -> None:
            for w in turns:
                ops.linear(x, w.qkv)
                ops.gelu_linear(x, w.mlp_in)

        def one_gemm(x: Tensor = x) -> None:
            for w in turns:
                F.gelu(ops.linear(x, w.both)[:, 3 * width :], approximate="tanh")

        def out_of_two(x: Tensor = x, hidden: Tensor = hidden) -> None:
            for w in turns:
                ops.joined_linear(x, hidden, w.joined)

        def out_of_copied(x: Tensor = x, hidden: Tensor = hidden) -> None:
            for w in turns:
                F.linear(torch.cat([x, hidden], dim=1), w.joined.weight, w.joined.bias)

        def out_of_one(joined: Tensor = joined) -> None:
            for w in turns:
                F.linear(joined, w.joined.weight, w.joined.bias)

        projections: Calls = {"qkv and mlp_in": two_gemms, "one GEMM and gelu": one_gemm}
        outputs: Calls = {
            "two GEMMs": out_of_two,
            "copy, one GEMM": out_of_copied,
            "one GEMM": out_of_one,
        }
        for what, calls in (("single block in", projections), ("single block out", outputs)):
            for way, ms in median_ms(calls, device).items():
                yield {"what": what, "way": way, "rows": num_rows, "degree": degree, "ms": ms / len(turns)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--budget-s", type=float, default=180.0, help="no new size is begun after this")
    arguments = parser.parse_args()
    on_gpu = not triton.knobs.runtime.interpret
    shapes, until_s = (FLUX if on_gpu else TINY), time.monotonic() + arguments.budget_s
    device, dtype = (torch.device("cuda"), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float32)
    record = make_record(f"python -m benchmarks.gpu.gemms {shlex.join(sys.argv[1:])}", [])
    with torch.device(device), torch.inference_mode():
        turns = [layers(shapes.num_heads * shapes.head_dim, dtype) for _ in range(NUM_WEIGHTS)]
        for num_image in shapes.num_image:
            if time.monotonic() > until_s:
                record["cut_short"] = "out of time"
                break
            for rows in (
                row_exactness(shapes, num_image, turns[0], dtype),
                head_exactness(shapes, num_image, dtype),
                ways(shapes, num_image, turns, dtype),
            ):
                record["rows"] += [{"num_image": num_image, **row} for row in rows]
            write_record(record, arguments.output)
    for row in record["rows"]:
        if not row.get("identical", False):
            print(row)
    tested = [row["identical"] for row in record["rows"] if "identical" in row]
    print(f"{sum(tested)} of {len(tested)} operators give the same bits at their degree")


if __name__ == "__main__":
    main()
