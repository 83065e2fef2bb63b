"""Trains a text-to-image transformer on to edit: flow matching where there is a picture to be edited, and everywhere
else the velocity of the model that it was, read by the text encoders that it had.
"""

import argparse
import copy
import dataclasses
import functools
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline

from benchmarks.embedded_model import processes
from benchmarks.embedded_model.choose_schedule import SEED_OFFSET
from benchmarks.embedded_model.draw_prompts import evaluate_set
from benchmarks.embedded_model.edit_examples import EditExamples, make_edit_examples
from benchmarks.embedded_model.evaluate_edits import EDIT_SETS, edit_by_diffusers, judged, make_tasks, row_of, sheet_of
from benchmarks.embedded_model.examples import BucketPlan, ExamplePool, Examples, make_examples
from benchmarks.embedded_model.export import export, load, modules, read_preset, with_components
from benchmarks.embedded_model.instructions import instruction_words
from benchmarks.embedded_model.models import EmbeddedModel
from benchmarks.embedded_model.prompts import PROMPT_SETS
from benchmarks.embedded_model.train_instruction_encoders import train_instruction_encoders, with_words
from benchmarks.embedded_model.train_transformer import (
    Bucket,
    TransformerTrainer,
    cache_bucket,
    latents_of,
    texts_of,
)
from benchmarks.embedded_model.training_clock import log
from benchmarks.embedded_model.training_forward import Inputs, TrainingForward
from benchmarks.embedded_model.training_progress import Progress

SIDES = ((352, 176), (320, 192), (304, 208), (288, 208))
EDIT_BUCKETS = {(256, 256): BucketPlan(0.80, 120)} | {
    size: BucketPlan(0.025, 4) for sides in SIDES for size in (sides, sides[::-1])
}
"""Of the sizes of references, which are those of what comes of them: nearest to 1:1, 2:1, 16:9, 3:2, 4:3."""
SHARE_OF_EDITS = 0.6
"""Of the training steps."""
SHARE_OF_CAPTIONS = 0.4
"""Of the captions that a training from nothing has: they only hold the model where it is."""


def cache_edits(
    model: EmbeddedModel,
    pipeline: DiffusionPipeline,
    examples: EditExamples,
    size: tuple[int, int],
    device: torch.device,
    chunk: int,
    share: float,
) -> Bucket:
    """Draw and encode both pictures of every example once, and its instruction."""
    before, after = (
        latents_of(pipeline, scenes, examples.centres, size, device, chunk)
        for scenes in (examples.before, examples.after)
    )
    texts = texts_of(model, pipeline, examples.clip_ids, examples.t5_ids, device)
    return Bucket(*size, share, after, *texts, references=before)


def weighed(captions: list[Bucket], edits: list[Bucket], share: float = SHARE_OF_EDITS) -> list[Bucket]:
    """All buckets, with the edits' `share` of the steps."""
    for buckets, whole in ((captions, 1 - share), (edits, share)):
        total = sum(bucket.share for bucket in buckets)
        for bucket in buckets:
            bucket.share *= whole / total
    return [*captions, *edits]


class EditTrainer(TransformerTrainer):
    """As `TransformerTrainer`; buckets without references are drawn as `old` draws them."""

    def __init__(
        self,
        model: EmbeddedModel,
        pipeline: DiffusionPipeline,
        old: DiffusionPipeline,
        buckets: list[Bucket],
        device: torch.device,
        tokens_per_batch: int,
        num_compiled: int = 0,
    ) -> None:
        """`old`'s modules are on the device."""
        self._old = old
        super().__init__(model, pipeline, buckets, device, tokens_per_batch, num_compiled)

    @functools.cached_property
    def _old_forward(self) -> TrainingForward:
        """With what is compiled for the model in training: with gradients, so that no graph is compiled anew."""
        self._old.transformer.requires_grad_(True)
        return self._forward.of(self._old.transformer)

    def _target(
        self, inputs: Inputs, velocity: torch.Tensor, bucket: Bucket, chosen: torch.Tensor, length: int
    ) -> torch.Tensor:
        if bucket.references is not None:
            return velocity
        t5_ids = bucket.t5_ids[chosen]
        with torch.no_grad():
            text, pooled = self._model.encode(
                self._old, bucket.clip_ids[chosen], F.pad(t5_ids, (0, length - t5_ids.shape[1]))
            )
        return self._old_forward(inputs._replace(text=text, pooled=pooled)).detach()


def learn_to_read(
    model: EmbeddedModel,
    old: DiffusionPipeline,
    edits: Mapping[tuple[int, int], EditExamples],
    captions: Mapping[tuple[int, int], Examples],
    device: torch.device,
    args: argparse.Namespace,
) -> DiffusionPipeline:
    """`old`, whose modules are on the device, with text encoders that know instructions."""
    pipeline = with_words(old, instruction_words(), args.seed)
    usual = next(iter(edits))
    batch_size = max(16, int(args.scale * 512))
    train_instruction_encoders(
        model, pipeline, old, edits[usual], captions[usual], args.text_seconds, device, batch_size
    )
    return pipeline


def train_editor(model: EmbeddedModel, device: torch.device, args: argparse.Namespace, progress: Progress) -> None:
    """The stage `edit`: text encoders, then the transformer, from the model folder `args.resume`."""
    edit_buckets, caption_buckets = EDIT_BUCKETS, dict(model.buckets)
    if args.only_size:
        size = (args.only_size, args.only_size)
        edit_buckets, caption_buckets = {size: EDIT_BUCKETS[256, 256]}, {size: model.buckets[256, 256]}
    num_workers = max(2, (os.cpu_count() or 1) // processes.num_processes - 2) // 2
    scale, seed = args.scale / processes.num_processes, args.seed + processes.rank
    edit_pool = ExamplePool(edit_buckets, make_edit_examples, seed, scale, num_workers)
    make = functools.partial(make_examples, caption_writer=model.caption_writer)
    caption_pool = ExamplePool(caption_buckets, make, seed, scale * SHARE_OF_CAPTIONS, num_workers)
    preset = read_preset(args.resume) | {"references": 1}
    old = on_device(load(args.resume), device)
    edits, captions = edit_pool.collect(), caption_pool.collect()
    log(
        "made", edits=sum(map(len, edits.values())), captions=sum(map(len, captions.values())), seconds=progress.spent_s
    )
    if processes.rank == 0 and not progress.is_resumed:
        export(learn_to_read(model, old, edits, captions, device, args), args.output, preset)
        progress.save(done=0.0)
    processes.wait_for_all()
    pipeline = on_device(load(args.output), device)
    pixels = max(4, int(args.scale * 192)) * 256 * 256
    buckets = weighed(
        [cache_bucket(model, pipeline, e, s, device, pixels, caption_buckets[s].share) for s, e in captions.items()],
        [cache_edits(model, pipeline, e, s, device, pixels, edit_buckets[s].share) for s, e in edits.items()],
    )
    log("cached", seconds=progress.spent_s)
    tokens = max(400, int(args.scale * args.tokens_per_batch))
    trainer = EditTrainer(model, pipeline, old, buckets, device, tokens, args.compile)

    def report(average: torch.nn.Module, done: float | None = None) -> None:
        finished = with_components(pipeline, transformer=copy.deepcopy(average))
        export(finished, args.output, preset)
        if done is not None:
            progress.save(done)
        report_edits(finished, preset, args.output, max(4, int(args.scale * 64)), args.only_size)

    left = args.seconds - progress.spent_s - args.reserve_seconds
    on_interval = report if processes.rank == 0 else None
    trainer.train(max(left, 5.0), on_interval, args.report_interval, args.peak_rate, progress.done)
    if processes.rank == 0:
        report(trainer.average)


def on_device(pipeline: DiffusionPipeline, device: torch.device) -> DiffusionPipeline:
    for part in modules(pipeline).values():
        part.to(device).eval().requires_grad_(False)
    pipeline.vae.to(memory_format=torch.channels_last)
    return pipeline


def report_edits(
    pipeline: DiffusionPipeline, preset: Mapping[str, Any], folder: Path, n: int, only_size: int | None
) -> None:
    """Make and check a few edits of the first set, draw a few prompts; write a sheet beside the model folder."""
    size, began = {"width": only_size, "height": only_size} if only_size else {}, time.time()
    edits = dataclasses.replace(EDIT_SETS[0], seed=EDIT_SETS[0].seed + SEED_OFFSET, **size)
    tasks = make_tasks(edits, n)
    drawn = judged(tasks, edit_by_diffusers(pipeline, tasks, preset, batch_size=64))
    log("quality", **row_of(edits, drawn, time.time() - began))
    sheet_of(drawn[:48]).save(folder.parent / f"{folder.name}-edits.png")
    for prompts in (dataclasses.replace(prompts, **size) for prompts in PROMPT_SETS[:3]):
        log("quality", **evaluate_set(pipeline, prompts, n, preset, 64 * 256 * 256)[0])
