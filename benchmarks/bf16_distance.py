"""How far latents in bf16 are from diffusers' in fp32: ours, and diffusers' own in bf16, on the same checkpoint.

    python -m benchmarks.bf16_distance OUTPUT.json --devices cuda:0                     the embedded model, a minute
    python -m benchmarks.bf16_distance OUTPUT.json --devices cuda:0 --model checkpoints/FLUX.1-dev       80 GB of memory
    python -m benchmarks.bf16_distance OUTPUT.json --devices cpu:1 --num-steps 4        a rehearsal: ours is fp32 there

Same prompt, same starting noise, same noise levels; each pipeline encodes the text itself. Distances are ‖a − b‖ / ‖b‖
of the last latents, b being diffusers' in fp32. `ratio`: ours over diffusers' own; at most 1 is wanted.
"""

import argparse
import asyncio
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline

from tetrion.engine.config import EngineConfig, parse_devices
from tetrion.engine.executors.processes import ProcessExecutor
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.measure.probe import SEED, Probe, Size
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.locate import resolve_model
from tetrion.engine.sampling.flow_match import initial_noise
from tetrion.entrypoints.arguments import parse_size
from tetrion.entrypoints.record import make_record, write_record

PROMPTS = (
    "a red circle left of a large blue star",
    "a small green heart on a black background",
    "an orange ring above a purple cross on a beige background",
    "a white diamond below a pink triangle on a navy background",
)
Case = tuple[str, Size]
Row = dict[str, Any]


async def ours(devices: str, spec: ModelSpec, cases: Sequence[Case], num_steps: int) -> list[torch.Tensor]:
    """The engine's own workers, at degree 1."""
    config = EngineConfig(devices=devices, model=spec.path)
    executor = ProcessExecutor(parse_devices(devices), spec, config)
    await executor.start()
    try:
        probe, found = Probe(executor, spec), []
        for prompt, size in cases:
            request = probe.request(size, num_steps, prompt)
            await probe.encode(request)
            await probe.denoise(request, [((0,), num_steps)])
            found.append(torch.from_numpy(await probe.latents(request)))
        return found
    finally:
        await executor.close()


def theirs(
    device: str, dtype: torch.dtype, spec: ModelSpec, cases: Sequence[Case], num_steps: int
) -> list[torch.Tensor]:
    pipeline = FluxPipeline.from_pretrained(spec.path, dtype=dtype, local_files_only=True).to(device)
    pipeline.set_progress_bar_config(disable=True)
    found = []
    for prompt, (width, height) in cases:
        latents = pipeline(
            prompt,
            width=width,
            height=height,
            num_inference_steps=num_steps,
            guidance_scale=spec.guidance,
            max_sequence_length=spec.max_text_tokens,
            latents=initial_noise(SEED, width, height, spec).unsqueeze(0).to(device, dtype),
            output_type="latent",
        ).images
        found.append(latents[0].float().cpu())
    return found


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def measure(devices: str, model: str, sizes: Sequence[Size], num_steps: int) -> list[Row]:
    spec = read_model_spec(resolve_model(model))
    cases = [(prompt, size) for size in sizes for prompt in PROMPTS]
    given = parse_devices(devices)[0]
    device = "cpu" if given.kind == "cpu" else given.name
    found = asyncio.run(ours(devices, spec, cases, num_steps))
    exact = theirs(device, torch.float32, spec, cases, num_steps)
    if device != "cpu":
        torch.cuda.empty_cache()
    rough = theirs(device, torch.bfloat16, spec, cases, num_steps)
    rows: list[Row] = []
    for (prompt, size), our, their, reference in zip(cases, found, rough, exact, strict=True):
        our_distance, their_distance = distance(our, reference), distance(their, reference)
        row = {"prompt": prompt, "px": f"{size[0]}x{size[1]}", "num_steps": num_steps}
        rows.append(row | {"ours": our_distance, "diffusers": their_distance, "ratio": our_distance / their_distance})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--devices", default="cuda:0", help="one device")
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--sizes", default="256x256,512x512")
    parser.add_argument("--num-steps", type=int, default=28)
    given = parser.parse_args()
    sizes = [parse_size(text) for text in given.sizes.split(",")]
    rows = measure(given.devices, given.model, sizes, given.num_steps)
    for row in rows:
        print("{px:10s} ours {ours:.5f}  diffusers {diffusers:.5f}  ratio {ratio:.2f}  {prompt}".format(**row))
    print(f"median ratio {statistics.median(row['ratio'] for row in rows):.2f}")
    command = f"python -m benchmarks.bf16_distance {shlex.join(sys.argv[1:])}"
    write_record(make_record(command, rows) | {"model": given.model}, given.output)


if __name__ == "__main__":
    main()
