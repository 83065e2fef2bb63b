"""What encoding a new prompt consists of, on one GPU: the engine's way, both encoders alone, T5's GEMMs alone.

    python -m benchmarks.encode OUTPUT.json                                             on a GPU
    python -m benchmarks.encode OUTPUT.json --device cpu --model shapes --load-format safetensors       a rehearsal

Random weights at full size. A row for each part, in milliseconds (median); on a GPU also the kernels that take most of
one encode, with how often they run. `tokens` is the host's part.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.loading import component_tensors, load_to_device
from tetrion.engine.models.locate import resolve_model
from tetrion.engine.models.registry import model_components
from tetrion.engine.models.text_encoders import TextEncoders, text_encoder_shapes
from tetrion.engine.worker.recorded_encoders import RecordedEncoders
from tetrion.engine.worker.work_queue import CudaQueue, ImmediateQueue, WorkQueue
from tetrion.entrypoints.bench.simulation import prompt_of
from tetrion.entrypoints.record import make_record, write_record

ENCODERS = ("text_encoder", "text_encoder_2")
REPEATS, KERNELS = 9, 16
Row = dict[str, Any]


def milliseconds(work: Callable[[int], object], queue: WorkQueue) -> float:
    """Median of a few runs, each waited for, after two that are not counted; `work` is given a number of its own."""
    times_ms = []
    for number in range(-2, REPEATS):
        queue.drain()
        began_s = time.monotonic()
        work(number)
        queue.drain()
        times_ms.append(1e3 * (time.monotonic() - began_s))
    return statistics.median(times_ms[2:])


def t5_gemms(spec: ModelSpec, queue: WorkQueue, dtype: torch.dtype) -> Callable[[], None]:
    """All products of T5's blocks with their matrices, each a matrix of its own, recorded."""
    _, shapes = text_encoder_shapes(Path(spec.path))
    names = [name for name, shape in shapes.items() if ".layer." in name and len(shape) == 2 and "bias" not in name]
    matrices = [torch.randn(shapes[name], device=queue.device, dtype=dtype) for name in names]
    widths = {matrix.shape[1] for matrix in matrices}
    inputs = {k: torch.randn(spec.max_text_tokens, k, device=queue.device, dtype=dtype) for k in widths}

    def run() -> None:
        for matrix in matrices:
            torch.nn.functional.linear(inputs[matrix.shape[1]], matrix)

    run()
    return queue.record(run)


def busiest_kernels(encode: Callable[[], object]) -> list[Row]:
    """Those that take most of one encode."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        encode()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)
    return [
        {"kernel": event.key[:120], "count": event.count, "ms": event.device_time_total / 1e3}
        for event in events[:KERNELS]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--model", default="flux1-dev")
    parser.add_argument("--load-format", default="dummy", choices=("dummy", "safetensors"))
    given = parser.parse_args()
    on_gpu = given.device == "cuda"
    queue: WorkQueue = CudaQueue(0) if on_gpu else ImmediateQueue()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    spec = read_model_spec(resolve_model(given.model), given.load_format)
    components = {name: model_components(spec, given.load_format)[name] for name in ENCODERS}
    tensors = load_to_device(components, queue.device, dtype)
    clip_tensors, t5_tensors = (component_tensors(tensors, name) for name in ENCODERS)
    encoders = TextEncoders(clip_tensors, t5_tensors, spec, given.load_format)
    recorded = RecordedEncoders(encoders, queue)
    tokens = encoders.tokens(prompt_of(0))
    clip_ids, t5_ids = tokens.clip.to(queue.device), tokens.t5.to(queue.device)
    both = queue.record(lambda: encoders.embed(clip_ids, t5_ids))
    gemms = t5_gemms(spec, queue, dtype)
    parts: dict[str, Callable[[int], object]] = {
        "tokens": lambda number: encoders.tokens(prompt_of(number)),
        "engine": lambda number: recorded.encode(prompt_of(number)),
        "not recorded": lambda number: encoders.encode(prompt_of(number)),
        "both encoders, recorded": lambda _: both(),
        "T5's GEMMs, recorded": lambda _: gemms(),
    }
    rows: list[Row] = []
    for part, work in parts.items():
        rows.append({"part": part, "ms": milliseconds(work, queue)})
        print(rows[-1], flush=True)
    record = make_record(f"python -m benchmarks.encode {shlex.join(sys.argv[1:])}", rows)
    record["kernels"] = busiest_kernels(lambda: recorded.encode(prompt_of(REPEATS))) if on_gpu else []
    for row in record["kernels"]:
        print(f"{row['ms']:7.3f} ms  {row['count']:4d} ×  {row['kernel']}")
    write_record(record, given.output)


if __name__ == "__main__":
    main()
