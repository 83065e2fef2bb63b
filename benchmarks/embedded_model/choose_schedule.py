"""Which shift of the noise levels draws best: evaluates a model folder under several, on prompts of its own.

`python -m benchmarks.embedded_model.choose_schedule --model checkpoints/shapes` prints a table, best last, and with
`--write` puts the best into the folder's scheduler. Best: the least share missing to the targets, summed over the sets;
then the highest rate. The evaluation's own prompts take no part in the choice.
"""

import argparse
import dataclasses
import itertools
import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from benchmarks.embedded_model.evaluate import evaluate_set
from benchmarks.embedded_model.prompts import PROMPT_SETS, PromptSet

BASE_SHIFTS = (1.3, 1.6)
"""Logarithm of the shift at 256 image tokens (a picture of 256²)."""
RISES = (1.5, 3.4)
"""Added to it at 4,096 image tokens, in proportion between; 3.4: with the square root up to 1,024 tokens (512²)."""
SEED_OFFSET = 10_000


def sets_to_choose_on() -> list[PromptSet]:
    """The sets that have a target, with prompts of their own."""
    wanted = [prompts for prompts in PROMPT_SETS if prompts.target is not None]
    return [dataclasses.replace(prompts, seed=prompts.seed + SEED_OFFSET) for prompts in wanted]


def with_shift(pipeline: FluxPipeline, base_shift: float, max_shift: float) -> FluxPipeline:
    """The pipeline under another schedule; its modules are shared."""
    config = dict(pipeline.scheduler.config) | {"base_shift": base_shift, "max_shift": max_shift}
    return FluxPipeline(**{**pipeline.components, "scheduler": FlowMatchEulerDiscreteScheduler.from_config(config)})


def merit(rows: list[dict]) -> tuple[float, float]:
    """Larger is better."""
    missing = sum(max(0.0, row["target"] - row["rate"]) for row in rows)
    return -round(missing, 6), sum(row["rate"] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--num-prompts", type=int, default=150)
    parser.add_argument("--write", action="store_true", help="put the best into the folder's scheduler")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    num_steps = json.loads((args.model / "preset.json").read_text())["num_steps"]
    pipeline = FluxPipeline.from_pretrained(args.model).to(args.device)
    pixels_per_batch = (128 if args.device == "cuda" else 4) * 256 * 256
    found = []
    for base_shift, rise in itertools.product(BASE_SHIFTS, RISES):
        tried = with_shift(pipeline, base_shift, round(base_shift + rise, 3))
        sets = sets_to_choose_on()
        rows = [evaluate_set(tried, prompts, args.num_prompts, num_steps, pixels_per_batch)[0] for prompts in sets]
        found.append((merit(rows), tried.scheduler, rows))
    found.sort(key=lambda entry: entry[0])
    for (minus_missing, _), scheduler, rows in found:
        rates = {row["set"]: row["rate"] for row in rows}
        shifts = {name: scheduler.config[name] for name in ("base_shift", "max_shift")}
        print(json.dumps({**shifts, "missing": -minus_missing, "rates": rates}), flush=True)
    if args.write:
        found[-1][1].save_pretrained(args.model / "scheduler")


if __name__ == "__main__":
    main()
