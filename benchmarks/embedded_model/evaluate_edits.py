"""How well a model folder edits, and whether it draws from text as well as another one.

Pictures to be edited are rendered; the engine draws what comes of them; `edit_checker` judges.
"""

import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FluxKontextPipeline
from PIL import Image

from benchmarks.embedded_model.before_after import before_after_sheet
from benchmarks.embedded_model.draw_prompts import (
    batch_size_for,
    draw_prompts,
    judge,
    of_each,
    sampling_of,
    wilson_interval,
)
from benchmarks.embedded_model.edit_checker import EditVerdict, check_edit
from benchmarks.embedded_model.edits import make_edits, scenes_of
from benchmarks.embedded_model.instructions import Edit, InstructionWriter
from benchmarks.embedded_model.models import SHAPES
from benchmarks.embedded_model.prompts import PROMPT_SETS, PromptSet, make_prompts
from benchmarks.embedded_model.renderer import draw
from benchmarks.embedded_model.world import Scene
from tetrion.engine.api import AsyncEngine
from tetrion.engine.config import EngineConfig
from tetrion.engine.request import ImageRequest

PAIRS_SEED_OFFSET = 20_000
REQUIREMENTS = ("background", "count", "others", "change", "pixels")
TARGET = 0.85
"""Share of edits that are right."""
LEAST_DIFFERENCE = -0.015
"""Lower end of the interval of (new - old) shares of right pictures from text."""


@dataclass(frozen=True)
class EditSet:
    """Edits at `width` x `height`, each of which leads from or to a scene that was held out of training, in one of
    `InstructionWriter`'s wordings."""

    name: str
    wording: str = "free"
    width: int = 256
    height: int = 256
    seed: int = 0
    target: float | None = None


EDIT_SETS = (
    EditSet("edit", seed=201, target=TARGET),
    EditSet("edit, canonical wording", "canonical", seed=202),
    EditSet("edit, held-out wording", "held-out", seed=203),
    EditSet("edit at 352x176", width=352, height=176, seed=204),
)


@dataclass(frozen=True)
class Task:
    """An edit to be made: the picture (height, width, 3), uint8, and the instruction."""

    edit: Edit
    text: str
    picture: np.ndarray


@dataclass(frozen=True)
class Edited:
    """A task, what came of it, and what is to be said of that."""

    task: Task
    after: np.ndarray
    verdict: EditVerdict

    @property
    def before(self) -> np.ndarray:
        return self.task.picture

    @property
    def text(self) -> str:
        return self.task.text


def sheet_of(drawn: Sequence[Edited]) -> Image.Image:
    """With a bar under what is right and what is wrong."""
    return before_after_sheet(drawn, [one.verdict.is_right for one in drawn])


def make_tasks(edits: EditSet, n: int) -> list[Task]:
    placed = make_edits(np.random.default_rng(edits.seed), n, edits.width, edits.height, held_out=True)
    writer = InstructionWriter(edits.seed, edits.wording)
    pictures = draw(scenes_of(placed.edits, "before"), placed.centres, edits.width, edits.height)
    arrays = ((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Task(edit, writer.write(edit).text, array) for edit, array in zip(placed.edits, arrays, strict=True)]


async def edit_by_engine(folder: Path, devices: str, tasks: Sequence[Task], seeds: Sequence[int]) -> list[np.ndarray]:
    """What the engine draws of every task from noise of its seed, at most 64 at once."""
    config = EngineConfig(models=(str(folder),), devices=devices)
    at_once = asyncio.Semaphore(64)
    async with AsyncEngine(config) as engine:

        async def one(task: Task, seed: int) -> np.ndarray:
            height, width, _ = task.picture.shape
            async with at_once:
                request = ImageRequest(
                    prompt=task.text, pictures=(task.picture,), width=width, height=height, seed=seed
                )
                return (await engine.generate(request)).image

        return await asyncio.gather(*map(one, tasks, seeds))


@torch.no_grad()
def edit_by_diffusers(
    pipeline: DiffusionPipeline, tasks: Sequence[Task], preset: dict[str, Any], batch_size: int, seed: int = 0
) -> list[np.ndarray]:
    """The same by diffusers in batches, for a look while training. All tasks' pictures have one size."""
    kontext = FluxKontextPipeline(**{name: part for name, part in pipeline.components.items()})
    kontext.set_progress_bar_config(disable=True)
    height, width, _ = tasks[0].picture.shape
    sampling = sampling_of(preset, width=width, height=height) | {"max_area": width * height, "_auto_resize": False}
    pictures = []
    for first in range(0, len(tasks), batch_size):
        part = tasks[first : first + batch_size]
        references = torch.stack([torch.as_tensor(task.picture) for task in part]).permute(0, 3, 1, 2) / 255
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(part))]
        images = kontext(
            image=references.float(), prompt=[task.text for task in part], generator=generators, **sampling
        ).images
        pictures += [np.asarray(image.convert("RGB")) for image in images]
    return pictures


def judged(tasks: Sequence[Task], pictures: Sequence[np.ndarray]) -> list[Edited]:
    return [
        Edited(task, picture, verdict)
        for task, picture, verdict in zip(
            tasks,
            pictures,
            of_each(check_edit, [task.picture for task in tasks], pictures, [task.edit for task in tasks]),
            strict=True,
        )
    ]


def row_of(edits: EditSet, drawn: Sequence[Edited], seconds: float) -> dict[str, Any]:
    """A row of the results."""
    num_right = sum(one.verdict.is_right for one in drawn)
    failures = Counter(name for one in drawn for name in REQUIREMENTS if not getattr(one.verdict, name))
    by_operation = {
        operation: f"{sum(v.is_right for v in verdicts)} of {len(verdicts)}"
        for operation in sorted({one.task.edit.operation for one in drawn})
        if (verdicts := [one.verdict for one in drawn if one.task.edit.operation == operation])
    }
    return {
        "set": edits.name,
        "size": f"{edits.width}x{edits.height}",
        "num_instructions": len(drawn),
        "fully_right": num_right,
        "rate": round(num_right / len(drawn), 4),
        "ci95": wilson_interval(num_right, len(drawn)),
        "target": edits.target,
        "failures": dict(failures),
        "by_operation": by_operation,
        "seconds": round(seconds, 1),
    }


def evaluate_edits(
    folder: Path, devices: str, sets: Sequence[EditSet], n: int
) -> list[tuple[dict[str, Any], list[Edited]]]:
    """Of every set a row of the results, and every edit with its verdict, through one engine; its seconds are those of
    all sets."""
    if not sets:
        return []
    began, tasks = time.time(), [make_tasks(edits, n) for edits in sets]
    seeds = [1000 * edits.seed + i for edits in sets for i in range(n)]
    pictures = asyncio.run(edit_by_engine(folder, devices, [*chain(*tasks)], seeds))
    drawn_s, drawn = time.time() - began, judged([*chain(*tasks)], pictures)
    by_set = [drawn[i * n : (i + 1) * n] for i in range(len(sets))]
    return [(row_of(edits, own, drawn_s) | {"devices": devices}, own) for edits, own in zip(sets, by_set, strict=True)]


def compare_from_text(
    old: DiffusionPipeline,
    new: DiffusionPipeline,
    n: int,
    preset: dict[str, Any],
    pixels_per_batch: int,
) -> dict[str, Any]:
    """The same prompts and seeds drawn by both, n a set; the difference of the shares right, with its interval.

    Prompts are others than those of the evaluation.
    """
    began, sets = time.time(), sets_to_compare()
    asked = [make_prompts(prompts, n) for prompts in sets]
    pictures = [
        draw_set(pipeline, *of, preset, pixels_per_batch)
        for pipeline in (old, new)
        for of in zip(sets, asked, strict=True)
    ]
    right = [verdict.is_right for verdict in judge([*chain(*pictures)], [scene for _, scene in chain(*asked)] * 2)]
    pairs = [*zip(right[: len(right) // 2], right[len(right) // 2 :], strict=True)]
    by_set = [pairs[i * n : (i + 1) * n] for i in range(len(sets))]
    rows = [
        {"set": prompts.name, "old": sum(a for a, _ in own), "new": sum(b for _, b in own), "of": n}
        for prompts, own in zip(sets, by_set, strict=True)
    ]
    difference, interval = paired_difference(pairs)
    return {
        "set": "from text, paired",
        "num_pictures": len(pairs),
        "old_rate": round(sum(a for a, _ in pairs) / len(pairs), 4),
        "new_rate": round(sum(b for _, b in pairs) / len(pairs), 4),
        "difference": difference,
        "ci95": interval,
        "least": LEAST_DIFFERENCE,
        "is_reached": interval[0] > LEAST_DIFFERENCE,
        "sets": rows,
        "seconds": round(time.time() - began, 1),
    }


def draw_set(
    pipeline: DiffusionPipeline,
    prompts: PromptSet,
    asked: Sequence[tuple[str, Scene]],
    preset: dict[str, Any],
    pixels_per_batch: int,
) -> list[np.ndarray]:
    """A picture of every prompt, the i-th from a seed of the set's."""
    size = {"width": prompts.width, "height": prompts.height}
    sampling = sampling_of(preset, **size, max_sequence_length=prompts.text_tokens)
    batch_size = batch_size_for(**size, pixels_per_batch=pixels_per_batch)
    return draw_prompts(pipeline, [text for text, _ in asked], sampling, batch_size, seed=1000 * prompts.seed)


def sets_to_compare() -> list[PromptSet]:
    """The sets that have a target, with prompts of their own."""
    wanted = [prompts for prompts in PROMPT_SETS if prompts.name in SHAPES.targets]
    return [dataclasses.replace(prompts, seed=prompts.seed + PAIRS_SEED_OFFSET) for prompts in wanted]


def paired_difference(pairs: Sequence[tuple[bool, bool]], z: float = 1.96) -> tuple[float, tuple[float, float]]:
    """Share right of the second less that of the first, and its 95 % interval (Wald's for paired shares)."""
    differences = np.array([int(b) - int(a) for a, b in pairs], float)
    reach = z * float(differences.std()) / len(pairs) ** 0.5
    mean = float(differences.mean())
    return round(mean, 5), (round(mean - reach, 5), round(mean + reach, 5))
