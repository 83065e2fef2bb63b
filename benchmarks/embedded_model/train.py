"""Trains an embedded model, from nothing or from a model folder, within a time budget; writes a model folder.

`python -m benchmarks.embedded_model.train --seconds 1500 --output checkpoints/shapes` does everything on one GPU;
`torchrun --nproc-per-node 2 -m benchmarks.embedded_model.train ...` trains the transformer on two, a batch each.
`--model` says which one. `--resume DIR` starts from the weights of a model folder; `--stages` then says what is trained
further, `--stages edit` that it is taught to edit. A run that was cut off goes on when the same command is given again:
from the last report, with the seconds left.
"""

import argparse
import copy
import functools
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from benchmarks.embedded_model import processes
from benchmarks.embedded_model.draw_prompts import evaluate_set, sheet
from benchmarks.embedded_model.examples import ExamplePool, Examples, make_examples
from benchmarks.embedded_model.export import export, load, with_components
from benchmarks.embedded_model.models import MODELS, EmbeddedModel
from benchmarks.embedded_model.prompts import PROMPT_SETS
from benchmarks.embedded_model.train_autoencoder import train_autoencoder
from benchmarks.embedded_model.train_editor import on_device, train_editor
from benchmarks.embedded_model.train_text_encoders import train_text_encoders
from benchmarks.embedded_model.train_transformer import TransformerTrainer, cache_bucket, zero_gates
from benchmarks.embedded_model.training_clock import log
from benchmarks.embedded_model.training_progress import Progress

EDIT = "edit"
STAGES = ("autoencoder", "decoder", "text", "transformer", EDIT)


def main() -> None:
    args = parse_arguments()
    model = MODELS[args.model]
    progress = Progress(args.output)
    device = processes.join(torch.device(args.device))
    torch.manual_seed(args.seed + processes.rank + int(1000 * progress.done))
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass fails at 12 heads of 32 in torch 2.11
    if args.stages == [EDIT]:
        train_editor(model, device, args, progress)
    else:
        train_from_text(model, device, args, progress)
    log("done", seconds=progress.spent_s)
    if processes.rank == 0:
        progress.finish()
    processes.leave()


def train_from_text(model: EmbeddedModel, device: torch.device, args: argparse.Namespace, progress: Progress) -> None:
    """All stages but the one that teaches to edit."""
    num_workers = max(1, (os.cpu_count() or 1) // processes.num_processes - 2)
    scale = args.scale / processes.num_processes
    make = functools.partial(make_examples, caption_writer=model.caption_writer)
    pool = ExamplePool(model.buckets, make, args.seed + processes.rank, scale, num_workers)
    if processes.rank == 0 and not progress.is_resumed:
        train_what_the_transformer_needs(model, args, pool, device)
        progress.save(done=0.0)
    processes.wait_for_all()
    if "transformer" in args.stages:
        train_and_report(model, on_device(load(args.output), device), pool.collect(), device, args, progress)


def train_what_the_transformer_needs(
    model: EmbeddedModel, args: argparse.Namespace, pool: ExamplePool, device: torch.device
) -> None:
    """The stages of the autoencoder and the text encoders, in the first process alone; exports all components."""
    pipeline = load(args.resume) if args.resume else model.build(args.seed)
    pixels = int(args.scale * 32 * 256 * 256)
    if "autoencoder" in args.stages:
        train_autoencoder(pipeline.vae, args.autoencoder_seconds, device, pixels)
    if "decoder" in args.stages:
        train_autoencoder(pipeline.vae, args.decoder_seconds, device, pixels, decoder_only=True)
    if "text" in args.stages:
        examples, batch_size = pool.collect()[256, 256], max(16, int(args.scale * 512))
        taggers = model.taggers(pipeline)
        train_text_encoders(taggers, examples, model.text_lengths, args.text_seconds, device, batch_size)
    if not args.resume or args.fresh_transformer:
        zero_gates(pipeline.transformer)
    export(pipeline, args.output, model.preset)


def train_and_report(
    model: EmbeddedModel,
    pipeline: DiffusionPipeline,
    examples: Mapping[tuple[int, int], Examples],
    device: torch.device,
    args: argparse.Namespace,
    progress: Progress,
) -> None:
    """The transformer's stage: cache latents, train, report now and then, export the moving average."""
    pixels = max(4, int(args.scale * 192)) * 256 * 256
    buckets = [cache_bucket(model, pipeline, e, s, device, pixels, model.buckets[s].share) for s, e in examples.items()]
    log("cached", counts=[len(e) for e in examples.values()], seconds=progress.spent_s)
    tokens = max(400, int(args.scale * args.tokens_per_batch))
    trainer = TransformerTrainer(model, pipeline, buckets, device, tokens, args.compile)

    def report(average: torch.nn.Module, done: float | None = None, folder: Path = args.output) -> None:
        finished = with_components(pipeline, transformer=copy.deepcopy(average))
        export(finished, folder, model.preset)
        if done is not None:
            progress.save(done)
        report_quality(model, finished, folder, max(4, int(args.scale * 64)))

    is_first = processes.rank == 0
    left = args.seconds - progress.spent_s - args.reserve_seconds - args.guidance_seconds
    on_interval = report if is_first else None
    trainer.train(max(left, 5.0), on_interval, args.report_interval, args.peak_rate, progress.done)
    if args.guidance_seconds > 0:
        if is_first:
            report(trainer.average, folder=args.output.with_name(f"{args.output.name}-unguided"))
        trainer.follow_own_guidance(args.guidance)
        trainer.train(args.guidance_seconds, peak=args.peak_rate / 2)
    if is_first:
        report(trainer.average)


@torch.no_grad()
def report_quality(model: EmbeddedModel, pipeline: DiffusionPipeline, folder: Path, n: int) -> None:
    """Draw and check a few prompts of the first three sets; write a contact sheet of each beside the model folder."""
    for prompts in PROMPT_SETS[:3]:
        row, drawn = evaluate_set(pipeline, prompts, n, model.preset, 64 * 256 * 256)
        log("quality", **row)
        sheet(drawn[:64]).save(folder.parent / f"{folder.name}-{prompts.name}.png")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="shapes")
    parser.add_argument("--seconds", type=float, required=True, help="budget of the whole run")
    parser.add_argument("--output", type=Path, required=True, help="model folder to write")
    parser.add_argument("--resume", type=Path, help="model folder to start from")
    parser.add_argument("--stages", nargs="+", choices=STAGES, help="default: all that the model has")
    parser.add_argument("--decoder-seconds", type=float, default=90.0, help="after the autoencoder, its encoder fixed")
    parser.add_argument("--autoencoder-seconds", type=float, default=140.0)
    parser.add_argument("--text-seconds", type=float, default=60.0)
    parser.add_argument("--reserve-seconds", type=float, default=25.0, help="kept for the last report and export")
    parser.add_argument("--report-interval", type=float, default=240.0, help="seconds between reports")
    parser.add_argument("--tokens-per-batch", type=int, default=98_304)
    parser.add_argument("--peak-rate", type=float, default=1.0, help="factor on the peak learning rates")
    parser.add_argument("--guidance", type=float, default=1.7, help="scale that is distilled into the transformer")
    parser.add_argument("--guidance-seconds", type=float, default=0.0, help="of the transformer's time, at its end")
    parser.add_argument("--fresh-transformer", action="store_true", help="with --resume: do not keep its transformer")
    parser.add_argument(
        "--compile", type=int, default=0, metavar="N", help="compile the blocks for the N commonest shapes"
    )
    parser.add_argument("--only-size", type=int, help="with the stage edit: squares of so many pixels, to rehearse it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on batch and data set sizes, for rehearsals")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    stages = MODELS[args.model].stages
    args.stages = args.stages or stages
    if EDIT in args.stages and not (args.stages == [EDIT] and args.resume and MODELS[args.model].is_editable):
        parser.error(f"--stages: {EDIT} comes alone, with --resume, and {args.model} must be a model that can learn it")
    if args.stages == [EDIT]:
        stages = (EDIT,)
    if lacking := set(args.stages) - set(stages):
        parser.error(f"--stages: {args.model} has none of {', '.join(sorted(lacking))}")
    if args.guidance_seconds and MODELS[args.model].preset["guidance"]:
        parser.error(f"--guidance-seconds: {args.model} is guided when it samples, nothing is to be distilled")
    return args


if __name__ == "__main__":
    main()
