"""Draws prompts with a model's pipeline and has the checker judge the pictures: rows of a table, contact sheets."""

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from benchmarks.embedded_model.checker import Verdict, check
from benchmarks.embedded_model.models import MODELS
from benchmarks.embedded_model.prompts import PromptSet, make_prompts
from benchmarks.embedded_model.world import Scene

REQUIREMENTS = ("background", "count", "colour", "shape", "size", "relation")
MANY = 300
"""Pictures to be judged for which processes are started."""


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
    return of_each(check, pictures, scenes)


def of_each(judge_one: Callable[..., Any], *columns: Sequence[Any]) -> list[Any]:
    """What a checker says of every row; by several processes where there are many."""
    if len(columns[0]) < MANY:
        with ThreadPoolExecutor(8) as threads:
            return list(threads.map(judge_one, *columns))
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        return list(pool.map(judge_one, *columns, chunksize=16))


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
