"""Evaluates a model folder: diffusers draws held-out prompts in float32, the checker judges every picture.

`python -m benchmarks.embedded_model.evaluate --output benchmarks/results/embedded-model.json`
"""

import argparse
import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from benchmarks.embedded_model.checker import Verdict, check, look
from benchmarks.embedded_model.export import load, read_preset
from benchmarks.embedded_model.models import MODELS
from benchmarks.embedded_model.prompts import PROMPT_SETS, PromptSet, make_prompts
from benchmarks.embedded_model.world import Scene, Thing

REQUIREMENTS = ("background", "count", "colour", "shape", "size", "relation")


NEGATIVE_PROMPT = "blue"
"""Of `evaluate_negative_prompt`: a colour."""
OPEN_PROMPT = "a circle"
"""Leaves the colour open."""


@torch.no_grad()
def draw_prompts(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    sampling: Mapping[str, Any],
    batch_size: int,
    seed: int = 0,
) -> list[np.ndarray]:
    """RGB pictures (height, width, 3) uint8; picture i starts from the noise of seed `seed + i`.

    `sampling` holds the pipeline's arguments that are the same for all: size, steps, guidance and so on.
    """
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for first in range(0, len(prompts), batch_size):
        part = prompts[first : first + batch_size]
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(part))]
        images = pipeline(part, generator=generators, **sampling).images
        pictures += [np.asarray(image.convert("RGB")) for image in images]
    return pictures


def sampling_of(preset: Mapping[str, Any], **changed: Any) -> dict[str, Any]:
    """The pipeline's arguments by the preset, FluxPipeline's or StableDiffusion3Pipeline's."""
    return {
        "width": preset["default_width"],
        "height": preset["default_height"],
        "num_inference_steps": preset["num_steps"],
        "guidance_scale": preset["guidance"] or 1.0,
        "max_sequence_length": preset["max_text_tokens"],
    } | changed


def batch_size_for(width: int, height: int, pixels_per_batch: int) -> int:
    return max(1, min(256, pixels_per_batch // (width * height)))


def judge(pictures: list[np.ndarray], scenes: list[Scene]) -> list[Verdict]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(check, pictures, scenes))


def wilson_interval(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson, 1927)."""
    p, scale = k / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    reach = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    return round(float(max(0.0, centre - reach)), 4), round(float(min(1.0, centre + reach)), 4)


def evaluate_set(
    pipeline: DiffusionPipeline, prompts: PromptSet, n: int, preset: Mapping[str, Any], pixels_per_batch: int
) -> tuple[dict, list[tuple[str, np.ndarray, Verdict]]]:
    """A row of the table, and every (prompt, picture, verdict)."""
    began = time.time()
    asked = make_prompts(prompts, n)
    size = {"width": prompts.width, "height": prompts.height}
    sampling = sampling_of(preset, **size, max_sequence_length=prompts.text_tokens)
    batch_size = batch_size_for(**size, pixels_per_batch=pixels_per_batch)
    pictures = draw_prompts(pipeline, [text for text, _ in asked], sampling, batch_size, seed=1000 * prompts.seed)
    verdicts = judge(pictures, [scene for _, scene in asked])
    num_right = sum(verdict.is_right for verdict in verdicts)
    failures = Counter(name for verdict in verdicts for name in REQUIREMENTS if not getattr(verdict, name))
    row = {
        "set": prompts.name,
        "size": f"{prompts.width}x{prompts.height}",
        "num_prompts": n,
        "num_steps": preset["num_steps"],
        "guidance": preset["guidance"],
        "text_tokens": prompts.text_tokens,
        "fully_right": num_right,
        "rate": round(num_right / n, 4),
        "ci95": wilson_interval(num_right, n),
        "target": MODELS[preset["name"]].targets.get(prompts.name),
        "failures": dict(failures),
        "seconds": round(time.time() - began, 1),
    }
    return row, [
        (text, picture, verdict) for (text, _), picture, verdict in zip(asked, pictures, verdicts, strict=True)
    ]


def evaluate_negative_prompt(
    pipeline: DiffusionPipeline, n: int, preset: Mapping[str, Any], pixels_per_batch: int
) -> tuple[dict, list[tuple[str, np.ndarray, Verdict]]]:
    """How often n seeds draw something blue, without and with `blue` as the negative prompt; some with it.

    `right`: share of pictures that show one circle of any known colour on white, of medium size.
    """
    row = {"set": "negative prompt", "prompt": OPEN_PROMPT, "negative_prompt": NEGATIVE_PROMPT, "num_seeds": n}
    row |= {"num_steps": preset["num_steps"], "guidance": preset["guidance"]}
    for name, negative in (("without", None), ("with", NEGATIVE_PROMPT)):
        sampling = sampling_of(preset, negative_prompt=negative)
        batch_size = batch_size_for(sampling["width"], sampling["height"], pixels_per_batch)
        pictures = draw_prompts(pipeline, [OPEN_PROMPT] * n, sampling, batch_size)
        verdicts = judge(pictures, [most_like_it(picture) for picture in pictures])
        colours = Counter(colour for v in verdicts for colour in {thing.colour if thing else None for thing in v.seen})
        row[name] = {
            "blue": round(colours[NEGATIVE_PROMPT] / n, 4),
            "right": round(sum(verdict.is_right for verdict in verdicts) / n, 4),
            "colours": {str(colour): count for colour, count in colours.most_common()},
        }
    row["ratio"] = round(row["with"]["blue"] / max(row["without"]["blue"], 1 / n), 4)
    return row, [(OPEN_PROMPT, *drawn) for drawn in zip(pictures, verdicts, strict=True)]


def most_like_it(picture: np.ndarray) -> Scene:
    """The scene of `OPEN_PROMPT`, in the colour of the first thing that is seen in the picture."""
    things = look(picture)[1]
    return Scene((Thing(things[0].colour if things and things[0] else "red", "circle"),))


def sheet(drawn: list[tuple[str, np.ndarray, Verdict]], columns: int = 8, side: int = 128) -> Image.Image:
    """A contact sheet; a red bar under every picture that is not fully right."""
    rows = -(-len(drawn) // columns)
    image = Image.new("RGB", (columns * (side + 4), rows * (side + 8)), "#444444")
    for i, (_, picture, verdict) in enumerate(drawn):
        x, y = i % columns * (side + 4) + 2, i // columns * (side + 8) + 2
        tile = Image.fromarray(picture)
        tile.thumbnail((side, side))
        image.paste(tile, (x, y))
        image.paste(Image.new("RGB", (side, 4), "#43A047" if verdict.is_right else "#E53935"), (x, y + side))
    return image


def host_name() -> str:
    accelerator = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    )
    return f"{platform.machine()}, {accelerator}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("configs/models/shapes"))
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets")
    parser.add_argument("--num-prompts", type=int, default=400)
    parser.add_argument("--num-steps", type=int, help="default: the preset's")
    parser.add_argument("--guidance", type=float, help="default: the preset's")
    parser.add_argument("--negative-seeds", type=int, default=0, help="of the negative prompt's test; 0: leave it out")
    parser.add_argument("--sets", nargs="*", help="names of prompt sets, default all")
    parser.add_argument("--commit", help="commit of the code, if known")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    preset = read_preset(args.model)
    preset |= {"num_steps": args.num_steps or preset["num_steps"], "guidance": args.guidance or preset["guidance"]}
    pipeline = load(args.model, args.device)
    pixels_per_batch = (128 if args.device == "cuda" else 4) * 256 * 256
    command = " ".join(["python -m benchmarks.embedded_model.evaluate", *sys.argv[1:]])
    result = {"host": host_name(), "commit": args.commit, "command": command, "dtype": "float32", "rows": []}

    def keep(row: dict, drawn: list[tuple[str, np.ndarray, Verdict]]) -> None:
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")  # after every set, in case that it is cut off
        if args.sheets:
            wrong = [item for item in drawn if not item[2].is_right]
            name = "".join(c if c.isalnum() else "-" for c in row["set"])
            sheet(drawn[:40] + wrong[:24]).save(args.sheets / f"{name}.png")

    for folder in (args.output.parent, args.sheets):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    for prompts in PROMPT_SETS:
        if not args.sets or prompts.name in args.sets:
            keep(*evaluate_set(pipeline, prompts, args.num_prompts, preset, pixels_per_batch))
    if args.negative_seeds:
        keep(*evaluate_negative_prompt(pipeline, args.negative_seeds, preset, pixels_per_batch))


if __name__ == "__main__":
    main()
