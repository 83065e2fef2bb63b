"""One rank's part in timing another system's transformer: sustained steps, answers.

Knows a transformer only as a module with diffusers' `forward`, whose arguments are in `diffusers_inputs.py`; how it is
parallel is the caller's.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tetrion.entrypoints.bench.diffusers_inputs import INPUTS, StepSize
from tetrion.entrypoints.bench.line_process import TAIL_CHARS, claim_stdout

GUIDANCE = 4.5
BATCH_S = 0.25
MIN_BATCHES = 3
Step = Callable[[], object]


class StepJob(msgspec.Struct, frozen=True, kw_only=True):
    """`transformer`: folder of its config.json. `sizes`: (width, height) in tokens, with the number they go by.
    `seconds`: how long each is timed. `until_s`: CLOCK_MONOTONIC; nothing is begun after it. `num_branches`: of
    classifier-free guidance."""

    transformer: str
    device: str
    num_text: int
    sizes: list[tuple[str, int, int]]
    seconds: float
    until_s: float
    num_branches: int = 1
    compiled: bool = False


def world() -> tuple[int, int]:
    """(rank, number of ranks)."""
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def device_of(job: StepJob) -> torch.device:
    """This rank's. On CPUs, where only rehearsals run, a rank has one thread."""
    if job.device == "cpu":
        torch.set_num_threads(1)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["RANK"]))
    torch.cuda.set_device(device)
    return device


def class_name(job: StepJob) -> str:
    """Of the transformer, as its config.json names it."""
    config: dict[str, Any] = json.loads((Path(job.transformer) / "config.json").read_text())
    return str(config["_class_name"])


def new_transformer(model: type[Any], job: StepJob, device: torch.device) -> Any:
    """Random weights at the real shapes, bf16 on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.set_default_dtype(dtype)
    with device:
        transformer = model.from_config(model.load_config(job.transformer)).eval()
    torch.set_default_dtype(torch.float32)
    return transformer


def run(build: Callable[[StepJob], nn.Module]) -> None:
    """The rank's whole life: read the job, build the transformer, time every size, rank 0 answers."""
    job = msgspec.json.decode(sys.argv[1], type=StepJob)
    with claim_stdout() as answers, torch.inference_mode() if not job.compiled else torch.no_grad():
        transformer = build(job)
        for name, width, height in job.sizes:
            if not agreed(time.monotonic() < job.until_s):
                break
            answer: dict[str, Any] = {"name": name}
            try:
                times = time_size(transformer, job, width, height)
                answer |= {"ms": statistics.median(times), "num_batches": len(times)}
            except torch.OutOfMemoryError as error:
                if world()[1] > 1:
                    raise  # the other ranks wait for this one
                answer["reason"] = f"out of memory: {error}"[:TAIL_CHARS]
            if world()[0] == 0:
                print(json.dumps(answer), file=answers, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def time_size(transformer: nn.Module, job: StepJob, width: int, height: int) -> list[float]:
    """Milliseconds a step, of batches of steps without a wait in between."""
    if job.compiled:
        torch._dynamo.reset()  # else the second size gets kernels for any size
    step = step_of(transformer, job, width, height)
    device = next(transformer.parameters()).device
    _seconds(step, 2, device)
    one_s = slowest(_seconds(step, 2, device) / 2, device)
    batch = max(1, min(50, int(BATCH_S / one_s)))
    num_batches = max(MIN_BATCHES, round(job.seconds / (batch * one_s)))
    return [1e3 * _seconds(step, batch, device) / batch for _ in range(num_batches)]


def step_of(transformer: Any, job: StepJob, width: int, height: int) -> Step:
    """One denoising step on random inputs, as diffusers' pipelines do it: the transformer, on all guidance branches at
    once, guidance, and the Euler update."""
    weight = next(transformer.parameters())
    generator = torch.Generator(weight.device).manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=weight.device, dtype=weight.dtype)

    size = StepSize(job.num_text, width, height, job.num_branches)
    latents, others, name, takes_list = INPUTS[class_name(job)](transformer.config, size, random)
    guided = job.num_branches > 1

    def step() -> None:
        batch = torch.cat([latents] * job.num_branches) if guided else latents
        given = {name: list(batch) if takes_list else batch}
        (velocity,) = transformer(**given, **others, return_dict=False)
        velocity = torch.stack(velocity) if takes_list else velocity
        if guided:
            negative, positive = velocity.chunk(2)
            velocity = negative + GUIDANCE * (positive - negative)
        torch.add(latents, velocity, alpha=-0.03)

    return step


def agreed(mine: bool) -> bool:
    """Rank 0's answer, everywhere."""
    if not dist.is_initialized():
        return mine
    answer = [mine]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


def slowest(seconds: float, device: torch.device) -> float:
    """The greatest of all ranks' values, everywhere."""
    value = torch.tensor(seconds, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def _seconds(step: Step, count: int, device: torch.device) -> float:
    started_s = time.perf_counter()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started_s
