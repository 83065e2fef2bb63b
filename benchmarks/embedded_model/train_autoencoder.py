"""Trains the AutoencoderKL on freshly drawn pictures and measures its latents' mean and deviation."""

import time

import numpy as np
import torch
from diffusers import AutoencoderKL

from benchmarks.embedded_model.renderer import draw
from benchmarks.embedded_model.scenes import place, sample_scenes
from benchmarks.embedded_model.training_clock import Clock, log

KL_WEIGHT = 2e-4  # on the mean over latent elements
LATENT_NOISE = 0.1  # extra deviation of the decoder's input, so that small errors of the transformer do not show
SQUARE_WEIGHT = 8.0  # of the squared error: a wrong patch of one small shape costs more than a soft edge everywhere
LEARNING_RATE = 1.5e-3
SIZES = {(256, 256): 0.45, (128, 128): 0.5, (512, 512): 0.05}
DECODER_SIZES = {(256, 256): 0.3, (128, 128): 0.6, (512, 512): 0.1}


def train_autoencoder(
    vae: AutoencoderKL, seconds: float, device: torch.device, pixels_per_batch: int, decoder_only: bool = False
) -> None:
    """Train in place; sets `shift_factor` and `scaling_factor` so that latents have mean 0 and deviation 1.

    `decoder_only` leaves the encoder, and so the latents and both factors, as they are: a transformer stays valid.
    """
    rng = np.random.default_rng(2 if decoder_only else 1)
    sizes_and_shares = DECODER_SIZES if decoder_only else SIZES
    torch.backends.cudnn.benchmark = True
    vae.to(device, memory_format=torch.channels_last).train()
    vae.requires_grad_(not decoder_only)
    for module in (vae.decoder, vae.post_quant_conv):
        if module is not None:
            module.requires_grad_(True)
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    clock, step, began = Clock(seconds, warmup_steps=50, hold=0.2), 0, time.time()
    sizes, shares = list(sizes_and_shares), list(sizes_and_shares.values())
    while clock.tick():
        width, height = sizes[rng.choice(len(sizes), p=shares)]
        pictures = draw_batch(rng, max(2, pixels_per_batch // (width * height)), width, height, device)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * clock.rate(step)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            posterior = vae.encode(pictures).latent_dist
            latents = posterior.mean + (posterior.std + LATENT_NOISE) * torch.randn_like(posterior.mean)
            decoded = vae.decode(latents).sample
        difference = decoded.float() - pictures
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        loss = difference.abs().mean() + SQUARE_WEIGHT * difference.square().mean() + KL_WEIGHT * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 200 == 0:
            log("autoencoder", step=step, l1=difference.abs().mean(), kl=kl, seconds=time.time() - began)
        step += 1
    torch.backends.cudnn.benchmark = False
    vae.eval().requires_grad_(True)
    if not decoder_only:
        measure_latents(vae, rng, device)
    log("autoencoder", step=step, l1=difference.abs().mean(), kl=kl, seconds=time.time() - began)


@torch.no_grad()
def measure_latents(vae: AutoencoderKL, rng: np.random.Generator, device: torch.device, num_batches: int = 8) -> None:
    """Set `shift_factor` and `scaling_factor` from the latents of 256 x 256 pictures."""
    latents = [vae.encode(draw_batch(rng, 16, 256, 256, device)).latent_dist.mean for _ in range(num_batches)]
    values = torch.cat(latents).float()
    vae.register_to_config(shift_factor=values.mean().item(), scaling_factor=1 / values.std().item())
    log("latents", mean=values.mean(), deviation=values.std(), by_channel=values.std((0, 2, 3)).tolist())


def draw_batch(rng, n: int, width: int, height: int, device) -> torch.Tensor:
    """Pictures (n, 3, height, width) of random scenes (pictures need no held-out rule: words are not involved)."""
    shorter = min(width, height)
    scenes = sample_scenes(rng, 2 * n + 8)
    centres, fits = place(rng, scenes, width / shorter, height / shorter)
    pictures = draw(scenes[fits][:n], centres[fits][:n], width, height, device)
    return pictures.contiguous(memory_format=torch.channels_last)
