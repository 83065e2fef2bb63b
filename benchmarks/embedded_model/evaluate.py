"""Evaluates a model folder: FluxPipeline draws held-out prompts in float32, the checker judges every picture.

`python -m benchmarks.embedded_model.evaluate --output benchmarks/results/embedded-model.json`
"""

import argparse
import json
import platform
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

from benchmarks.embedded_model.checker import Verdict, check
from benchmarks.embedded_model.prompts import PROMPT_SETS, PromptSet, make_prompts
from benchmarks.embedded_model.world import Scene

REQUIREMENTS = ("background", "count", "colour", "shape", "size", "relation")


@torch.no_grad()
def draw_prompts(
    pipeline: FluxPipeline,
    prompts: list[str],
    width: int,
    height: int,
    num_steps: int,
    text_tokens: int,
    batch_size: int,
    seed: int = 0,
) -> list[np.ndarray]:
    """RGB pictures (height, width, 3) uint8; picture i starts from the noise of seed `seed + i`."""
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for first in range(0, len(prompts), batch_size):
        part = prompts[first : first + batch_size]
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(part))]
        images = pipeline(
            part,
            width=width,
            height=height,
            num_inference_steps=num_steps,
            max_sequence_length=text_tokens,
            generator=generators,
        ).images
        pictures += [np.asarray(image.convert("RGB")) for image in images]
    return pictures


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
    pipeline: FluxPipeline, prompts: PromptSet, n: int, num_steps: int, pixels_per_batch: int
) -> tuple[dict, list[tuple[str, np.ndarray, Verdict]]]:
    """A row of the table, and every (prompt, picture, verdict)."""
    began = time.time()
    asked = make_prompts(prompts, n)
    batch_size = max(1, min(256, pixels_per_batch // (prompts.width * prompts.height)))
    pictures = draw_prompts(
        pipeline,
        [text for text, _ in asked],
        prompts.width,
        prompts.height,
        num_steps,
        prompts.text_tokens,
        batch_size,
        seed=1000 * prompts.seed,
    )
    verdicts = judge(pictures, [scene for _, scene in asked])
    num_right = sum(verdict.is_right for verdict in verdicts)
    failures = Counter(name for verdict in verdicts for name in REQUIREMENTS if not getattr(verdict, name))
    row = {
        "set": prompts.name,
        "size": f"{prompts.width}x{prompts.height}",
        "num_prompts": n,
        "num_steps": num_steps,
        "text_tokens": prompts.text_tokens,
        "fully_right": num_right,
        "rate": round(num_right / n, 4),
        "ci95": wilson_interval(num_right, n),
        "target": prompts.target,
        "failures": dict(failures),
        "seconds": round(time.time() - began, 1),
    }
    return row, [
        (text, picture, verdict) for (text, _), picture, verdict in zip(asked, pictures, verdicts, strict=True)
    ]


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
    parser.add_argument("--sets", nargs="*", help="names of prompt sets, default all")
    parser.add_argument("--commit", help="commit of the code, if known")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    num_steps = args.num_steps or json.loads((args.model / "preset.json").read_text())["num_steps"]
    pipeline = FluxPipeline.from_pretrained(args.model).to(args.device)
    pixels_per_batch = (128 if args.device == "cuda" else 4) * 256 * 256
    command = " ".join(["python -m benchmarks.embedded_model.evaluate", *sys.argv[1:]])
    result = {"host": host_name(), "commit": args.commit, "command": command, "dtype": "float32", "rows": []}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for prompts in PROMPT_SETS:
        if args.sets and prompts.name not in args.sets:
            continue
        row, drawn = evaluate_set(pipeline, prompts, args.num_prompts, num_steps, pixels_per_batch)
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")  # after every set, in case that it is cut off
        if args.sheets:
            args.sheets.mkdir(parents=True, exist_ok=True)
            wrong = [item for item in drawn if not item[2].is_right]
            name = "".join(c if c.isalnum() else "-" for c in prompts.name)
            sheet(drawn[:40] + wrong[:24]).save(args.sheets / f"{name}.png")


if __name__ == "__main__":
    main()
