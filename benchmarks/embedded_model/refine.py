"""Trains the transformer a little further on a CPU, in bfloat16 with AdamW and small batches, from a model folder.

`python -m benchmarks.embedded_model.refine --seconds 960 --model configs/models/shapes --output checkpoints/shapes`
"""

import argparse
import copy
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.embedded_model.examples import make_examples
from benchmarks.embedded_model.export import export, load
from benchmarks.embedded_model.train_transformer import cache_bucket, sample_sigmas
from benchmarks.embedded_model.training_clock import Clock, log

# (width, height): (share of steps, pictures per thousand, batch size)
SIZES = {(256, 256): (0.74, 640, 24), (128, 128): (0.14, 250, 48), (512, 256): (0.12, 110, 12)}
AVERAGE_DECAY = 0.99


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--num-pictures", type=int, default=3000)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng, began = np.random.default_rng(args.seed), time.time()
    components = load(args.model)
    device = torch.device("cpu")
    buckets = []
    for i, ((width, height), (_, share, _)) in enumerate(SIZES.items()):
        examples = make_examples(args.seed * 100 + i, args.num_pictures * share // 1000, width, height)
        buckets.append(cache_bucket(components.vae, examples, width, height, device, 8 * 256 * 256))
    log("cached", seconds=time.time() - began)
    transformer = components.transformer.train()
    average = copy.deepcopy(transformer).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(transformer.parameters(), args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    timestep = [torch.zeros(1)]
    transformer.time_text_embed.register_forward_pre_hook(lambda _, inputs: (timestep[0] * 1000, *inputs[1:]))
    clock, step, smoothed = Clock(args.seconds - (time.time() - began), warmup_steps=15, hold=0.1), 0, None
    settings = list(SIZES.values())
    while not clock.is_over:
        k = rng.choice(len(buckets), p=[share for share, _, _ in settings])
        bucket, n = buckets[k], settings[k][2]
        length = 64 if rng.random() < 0.92 else 128
        chosen = torch.randint(len(bucket.latents), (n,))
        with torch.no_grad():
            ids = F.pad(bucket.t5_ids[chosen], (0, length - bucket.t5_ids.shape[1]))
            text = components.text_encoder_2(ids).last_hidden_state
            pooled = components.text_encoder(bucket.clip_ids[chosen]).pooler_output
        clean = bucket.latents[chosen].float()
        noise, sigma = torch.randn_like(clean), sample_sigmas(n, device)
        timestep[0] = sigma
        with torch.autocast("cpu", torch.bfloat16):
            velocity = transformer(
                hidden_states=torch.lerp(clean, noise, sigma[:, None, None]),
                timestep=sigma,
                pooled_projections=pooled,
                encoder_hidden_states=text,
                img_ids=bucket.image_ids,
                txt_ids=torch.zeros(length, 3),
                return_dict=False,
            )[0]
        loss = F.mse_loss(velocity.float(), noise - clean)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * clock.rate(step)
        optimizer.step()
        with torch.no_grad():
            decay = min(AVERAGE_DECAY, (step + 1) / (step + 5))
            torch._foreach_lerp_(list(average.parameters()), list(transformer.parameters()), 1 - decay)
        smoothed = loss.item() if smoothed is None else 0.95 * smoothed + 0.05 * loss.item()
        if step % 25 == 0:
            log("refine", step=step, loss=smoothed, rate=clock.rate(step), seconds=time.time() - began)
        step += 1
    log("refine", step=step, loss=smoothed, seconds=time.time() - began)
    export(dataclasses.replace(components, transformer=average), args.output)


if __name__ == "__main__":
    main()
