"""Which shift of the noise levels and which guidance draw best: evaluates a model folder under several, on own prompts.

`python -m benchmarks.embedded_model.choose_schedule --model checkpoints/shapes` prints a table, best last, and with
`--write` puts the best into the folder's scheduler and preset. Best: the least share missing to the targets, summed
over the sets; then the highest rate. The evaluation's own prompts take no part in the choice.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from benchmarks.embedded_model.draw_prompts import evaluate_set
from benchmarks.embedded_model.export import load, read_preset, with_components, write_preset
from benchmarks.embedded_model.models import MODELS, EmbeddedModel, SamplingChoice
from benchmarks.embedded_model.prompts import PROMPT_SETS, PromptSet

SEED_OFFSET = 10_000


def sets_to_choose_on(model: EmbeddedModel) -> list[PromptSet]:
    """The sets that have a target, with prompts of their own."""
    wanted = [prompts for prompts in PROMPT_SETS if prompts.name in model.targets]
    return [dataclasses.replace(prompts, seed=prompts.seed + SEED_OFFSET) for prompts in wanted]


def with_schedule(pipeline: DiffusionPipeline, choice: SamplingChoice) -> DiffusionPipeline:
    """The pipeline under another schedule; its modules are shared."""
    config = dict(pipeline.scheduler.config) | dict(choice.scheduler)
    return with_components(pipeline, scheduler=FlowMatchEulerDiscreteScheduler.from_config(config))


def merit(rows: list[dict]) -> tuple[float, float]:
    """Larger is better."""
    missing = sum(max(0.0, row["target"] - row["rate"]) for row in rows)
    return -round(missing, 6), sum(row["rate"] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--num-prompts", type=int, default=150)
    parser.add_argument("--write", action="store_true", help="put the best into the folder's scheduler and preset")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    preset = read_preset(args.model)
    model = MODELS[preset["name"]]
    pipeline = load(args.model, args.device)
    pixels_per_batch = (128 if args.device == "cuda" else 4) * 256 * 256
    found = []
    for choice in model.sampling_choices:
        tried, by = with_schedule(pipeline, choice), preset | {"guidance": choice.guidance}
        sets = sets_to_choose_on(model)
        rows = [evaluate_set(tried, prompts, args.num_prompts, by, pixels_per_batch)[0] for prompts in sets]
        found.append((merit(rows), choice, rows))
    found.sort(key=lambda entry: entry[0])
    for (minus_missing, _), choice, rows in found:
        rates = {row["set"]: row["rate"] for row in rows}
        made = {**choice.scheduler, "guidance": choice.guidance}
        print(json.dumps({**made, "missing": -minus_missing, "rates": rates}), flush=True)
    if args.write:
        best = found[-1][1]
        with_schedule(pipeline, best).scheduler.save_pretrained(args.model / "scheduler")
        write_preset(args.model, preset | {"guidance": best.guidance})


if __name__ == "__main__":
    main()
