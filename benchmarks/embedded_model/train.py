"""Trains the embedded model, from nothing or from a model folder, within a time budget; writes a model folder.

`python -m benchmarks.embedded_model.train --seconds 1500 --output checkpoints/shapes` does everything on one GPU;
`torchrun --nproc-per-node 2 -m benchmarks.embedded_model.train ...` trains the transformer on two, a batch each.
`--resume DIR` starts from the weights of a model folder; `--stages` then says what is trained further.
"""

import argparse
import copy
import dataclasses
import os
import time
from pathlib import Path

import torch
from diffusers import FluxPipeline

from benchmarks.embedded_model import processes
from benchmarks.embedded_model.architecture import PRESET, Components, build
from benchmarks.embedded_model.evaluate import evaluate_set, sheet
from benchmarks.embedded_model.examples import ExamplePool
from benchmarks.embedded_model.export import export, load
from benchmarks.embedded_model.prompts import PROMPT_SETS
from benchmarks.embedded_model.train_autoencoder import train_autoencoder
from benchmarks.embedded_model.train_text_encoders import train_text_encoders
from benchmarks.embedded_model.train_transformer import TransformerTrainer, cache_bucket, zero_gates
from benchmarks.embedded_model.training_clock import log

STAGES = ("autoencoder", "decoder", "text", "transformer")


def main() -> None:
    args = parse_arguments()
    device = processes.join(torch.device(args.device))
    began = time.time()
    torch.manual_seed(args.seed + processes.rank)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass fails at 12 heads of 32 in torch 2.11
    num_workers = max(1, (os.cpu_count() or 1) // processes.num_processes - 2)
    pool = ExamplePool(args.seed + processes.rank, args.scale / processes.num_processes, num_workers)
    if processes.rank == 0:
        train_what_the_transformer_needs(args, pool, device)
    processes.wait_for_all()
    components = load(args.output)
    components.text_encoder.to(device).eval().requires_grad_(False)
    components.text_encoder_2.to(device).eval().requires_grad_(False)
    components.vae.to(device, memory_format=torch.channels_last).eval()
    if "transformer" in args.stages:
        train_and_report(components, pool.collect(), device, args, began)
    log("done", seconds=time.time() - began)
    processes.leave()


def train_what_the_transformer_needs(args: argparse.Namespace, pool: ExamplePool, device: torch.device) -> None:
    """The stages of the autoencoder and the text encoders, in the first process alone; exports all components."""
    components = load(args.resume) if args.resume else build(args.seed)
    pixels = int(args.scale * 32 * 256 * 256)
    if "autoencoder" in args.stages:
        train_autoencoder(components.vae, args.autoencoder_seconds, device, pixels)
    if "decoder" in args.stages:
        train_autoencoder(components.vae, args.decoder_seconds, device, pixels, decoder_only=True)
    if "text" in args.stages:
        train_text_encoders(
            components.text_encoder_2,
            components.text_encoder,
            pool.collect()[256, 256],
            args.text_seconds,
            device,
            max(16, int(args.scale * 512)),
        )
    if not args.resume or args.fresh_transformer:
        zero_gates(components.transformer)
    export(on_cpu(components), args.output)


def train_and_report(components: Components, examples: dict, device: torch.device, args, began: float) -> None:
    """The transformer's stage: cache latents, train, report now and then, export the moving average."""
    pixels = max(4, int(args.scale * 192)) * 256 * 256
    buckets = [cache_bucket(components, e, w, h, device, pixels) for (w, h), e in examples.items()]
    log("cached", counts=[len(e) for e in examples.values()], seconds=time.time() - began)
    tokens = max(400, int(args.scale * args.tokens_per_batch))
    trainer = TransformerTrainer(components, buckets, device, tokens, args.compile)

    def report(average, folder: Path = args.output) -> None:
        finished = dataclasses.replace(components, transformer=average)
        export(on_cpu(finished), folder)
        report_quality(finished, folder, max(4, int(args.scale * 64)))

    is_first = processes.rank == 0
    left = args.seconds - (time.time() - began) - args.reserve_seconds - args.guidance_seconds
    trainer.train(max(left, 5.0), report if is_first else None, args.report_interval, args.peak_rate)
    if args.guidance_seconds > 0:
        if is_first:
            report(trainer.average, args.output.with_name(f"{args.output.name}-unguided"))
        trainer.follow_own_guidance(args.guidance)
        trainer.train(args.guidance_seconds, peak=args.peak_rate / 2)
    if is_first:
        report(trainer.average)


def on_cpu(components: Components) -> Components:
    """A float32 copy that may be exported while training goes on."""
    copies = {name: copy.deepcopy(module).cpu() for name, module in components.modules().items()}
    return dataclasses.replace(components, **copies)


@torch.no_grad()
def report_quality(components: Components, folder: Path, n: int) -> None:
    """Draw and check a few prompts of the first three sets; write a contact sheet of each beside the model folder."""
    pipeline = FluxPipeline(**{name: getattr(components, name) for name in Components.__dataclass_fields__})
    for prompts in PROMPT_SETS[:3]:
        row, drawn = evaluate_set(pipeline, prompts, n, PRESET["num_steps"], 64 * 256 * 256)
        log("quality", **row)
        sheet(drawn[:64]).save(folder.parent / f"{folder.name}-{prompts.name}.png")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, required=True, help="budget of the whole run")
    parser.add_argument("--output", type=Path, required=True, help="model folder to write")
    parser.add_argument("--resume", type=Path, help="model folder to start from")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on batch and data set sizes, for rehearsals")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
