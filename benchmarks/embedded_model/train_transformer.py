"""Trains a transformer by flow matching on cached latents, in size buckets, on a wall-clock schedule."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import nn

from benchmarks.embedded_model import processes
from benchmarks.embedded_model.batched_muon import BatchedMuon
from benchmarks.embedded_model.examples import Examples
from benchmarks.embedded_model.models import EmbeddedModel
from benchmarks.embedded_model.renderer import draw
from benchmarks.embedded_model.scenes import SceneArrays
from benchmarks.embedded_model.training_clock import Clock, log
from benchmarks.embedded_model.training_forward import Inputs, TrainingForward

MATRIX_RATE, OTHER_RATE = 2e-3, 1.5e-3  # peak learning rates of Muon and AdamW
EMA_DECAY = 0.998
LOSS_WEIGHT = 0.05  # of a step in the moving averages that are logged
TIMESTEP_SHIFT = 2.5  # at SHIFT_TOKENS image tokens, growing with the square root of their number: a larger picture
SHIFT_TOKENS = 256  # needs more noise before its layout is lost (arXiv:2403.03206, section 5.3.2)


@dataclass
class Bucket:
    """Latents (N, image tokens, 4 * channels) of one picture size, with their captions' ids and vectors."""

    width: int
    height: int
    share: float  # of the training steps
    latents: torch.Tensor
    clip_ids: torch.Tensor
    t5_ids: torch.Tensor
    text: torch.Tensor  # (N, text tokens, text_dim) for the usual text length
    pooled: torch.Tensor
    references: torch.Tensor | None = None
    """Latents of the pictures that are edited, shaped as `latents`."""

    @property
    def num_image(self) -> int:
        """Tokens of pictures in the sequence."""
        return self.latents.shape[1] * (1 if self.references is None else 2)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, H/2 * W/2, 4 C), FluxPipeline's order."""
    n, c, h, w = latents.shape
    return latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h // 2 * (w // 2), 4 * c)


@torch.no_grad()
def cache_bucket(
    model: EmbeddedModel,
    pipeline: DiffusionPipeline,
    examples: Examples,
    size: tuple[int, int],
    device: torch.device,
    chunk: int,
    share: float,
) -> Bucket:
    """Draw and encode every example once, its caption too; `chunk` pixels at a time, `size` is width and height."""
    latents = latents_of(pipeline, examples.scenes, examples.centres, size, device, chunk)
    texts = texts_of(model, pipeline, examples.clip_ids, examples.t5_ids, device)
    return Bucket(*size, share, latents, *texts)


@torch.no_grad()
def latents_of(
    pipeline: DiffusionPipeline,
    scenes: SceneArrays,
    centres: np.ndarray,
    size: tuple[int, int],
    device: torch.device,
    chunk: int,
) -> torch.Tensor:
    """The scenes drawn and encoded, (N, image tokens, 4 * channels), float16; `chunk` pixels at a time."""
    vae, step, latents = pipeline.vae, max(1, chunk // (size[0] * size[1])), []
    for first in range(0, len(scenes), step):
        pictures = draw(scenes[first : first + step], centres[first : first + step], *size, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            mean = vae.encode(pictures.contiguous(memory_format=torch.channels_last)).latent_dist.mean.float()
        latents.append(pack((mean - vae.config.shift_factor) * vae.config.scaling_factor).to(torch.float16))
    return torch.cat(latents)


@torch.no_grad()
def texts_of(
    model: EmbeddedModel, pipeline: DiffusionPipeline, clip_ids: np.ndarray, t5_ids: np.ndarray, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """CLIP's and T5's ids on the device, what they say in rows (N, text tokens, text_dim) and pooled vectors."""
    clip, t5 = (torch.as_tensor(ids, device=device).long() for ids in (clip_ids, t5_ids))
    said = [model.encode(pipeline, *ids) for ids in zip(clip.split(2048), t5.split(2048), strict=True)]
    return clip, t5, torch.cat([rows.to(torch.bfloat16) for rows, _ in said]), torch.cat([pooled for _, pooled in said])


def optimizers_of(transformer: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' square-ish matrices, AdamW for modulation, embeddings, norms, biases and the output."""
    matrices, others = [], []
    for name, parameter in transformer.named_parameters():
        is_matrix = "transformer_blocks" in name and parameter.ndim == 2 and ".norm" not in name
        (matrices if is_matrix else others).append(parameter)
    muon = BatchedMuon(matrices, lr=MATRIX_RATE, weight_decay=0.05)
    adamw = torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    return [muon, adamw]


def sample_sigmas(n: int, num_tokens: int, device) -> torch.Tensor:
    """Noise levels (n,) for pictures of `num_tokens`: logit-normal, shifted, a fifth uniform."""
    shift = TIMESTEP_SHIFT * (num_tokens / SHIFT_TOKENS) ** 0.5
    u = torch.sigmoid(torch.randn(n, device=device))
    u = torch.where(torch.rand(n, device=device) < 0.2, torch.rand(n, device=device), u)
    return shift * u / (1 + (shift - 1) * u)


@torch.no_grad()
def zero_gates(transformer: nn.Module) -> None:
    """adaLN-Zero (Peebles and Xie, 2023): every block starts as the identity, the model's output at zero."""
    for name, parameter in transformer.named_parameters():
        if ".norm1.linear" in name or ".norm1_context.linear" in name or ".norm.linear" in name:
            parameter.zero_()
        if name.startswith(("proj_out", "norm_out.linear")):
            parameter.zero_()


class TransformerTrainer:
    """Owns the transformer, its moving average and the optimizers; text encoders stay as they were pre-trained.

    Several processes that start from the same weights keep them the same: gradients are averaged, and every step's
    size, text length and learning rate are common to all.
    """

    def __init__(
        self,
        model: EmbeddedModel,
        pipeline: DiffusionPipeline,
        buckets: list[Bucket],
        device: torch.device,
        tokens_per_batch: int,
        num_compiled: int = 0,
    ):
        self._model = model
        self._pipeline = pipeline
        self._buckets = buckets
        self._device = device
        self._tokens_per_batch = tokens_per_batch
        self.transformer = pipeline.transformer.to(device).train().requires_grad_(True)
        self.average = copy.deepcopy(self.transformer).eval().requires_grad_(False)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._forward: TrainingForward = model.forward(self.transformer, dtype)
        self._optimizers = optimizers_of(self.transformer)
        self._peaks = [group["lr"] for optimizer in self._optimizers for group in optimizer.param_groups]
        self._rng = np.random.default_rng(int(processes.shared(time.time())))
        shares = np.array([bucket.share for bucket in buckets])
        self._shares = shares / shares.sum()
        self._lengths, self._length_shares = list(model.text_lengths), list(model.text_lengths.values())
        self._teacher: TrainingForward | None = None
        self._guidance = 1.0
        self._compile(num_compiled)

    def follow_own_guidance(self, scale: float) -> None:
        """From now on train towards the moving average's guided velocity (guidance distillation, arXiv:2210.03142).

        Sampling then costs one evaluation a step, as without guidance.
        """
        # its parameters require gradients, which are not asked for, so that no graph is compiled anew
        teacher = copy.deepcopy(self.average).requires_grad_(True)
        self._teacher, self._guidance = self._forward.of(teacher), scale
        with torch.no_grad():
            torch._foreach_copy_(list(self.transformer.parameters()), list(self.average.parameters()))
        self._optimizers = optimizers_of(self.transformer)

    def train(
        self,
        seconds: float,
        on_interval: Callable[[nn.Module, float], None] | None = None,
        interval_s: float = 240.0,
        peak: float = 1.0,
        done: float = 0.0,
    ) -> int:
        """Train for `seconds`, in which the schedule goes from the share `done` to its end.

        `on_interval(average, share done)` is called now and then. Returns the number of steps.
        """
        clock = Clock(seconds, warmup_steps=100, hold=0.25, is_shared=True, done=done)
        step, began, num_samples = 0, time.time(), 0
        last_call, losses = time.time(), {}
        while clock.tick():
            rate = peak * clock.rate(step)
            groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
            for group, base in zip(groups, self._peaks, strict=True):
                group["lr"] = base * rate
            name, loss, n = self._step()
            losses[name] = loss if name not in losses else torch.lerp(losses[name], loss, LOSS_WEIGHT)
            self._update_average(min(EMA_DECAY, (step + 1) / (step + 20)))
            num_samples += n * processes.num_processes
            if step % 100 == 0:
                log("transformer", step=step, **losses, rate=rate, samples=num_samples, seconds=time.time() - began)
            if on_interval is not None and time.time() - last_call > interval_s and clock.progress < 0.9:
                on_interval(self.average, clock.progress)  # the others wait for this process at their next tick
                last_call = time.time()
            step += 1
        log("transformer", step=step, **losses, samples=num_samples, seconds=time.time() - began)
        return step

    def _compile(self, num_shapes: int) -> None:
        """Compile the blocks for the most frequent shapes; where that fails, say so and stay eager."""
        by_share = sorted(self._buckets, key=lambda bucket: -bucket.share)
        length, began = self._lengths[0], time.time()
        try:
            for bucket in by_share[:num_shapes]:
                shape = self._batch_size(bucket, length), bucket.text.shape[1], bucket.num_image
                self._forward.compile_for(*shape)
                self._loss(bucket, length)[0].backward()
                log("compile", width=bucket.width, height=bucket.height, seconds=time.time() - began)
        except Exception as error:
            self._forward.compile_nothing()
            log("compile", failed=f"{type(error).__name__}: {error}"[:500])
        self.transformer.zero_grad(set_to_none=True)

    def _batch_size(self, bucket: Bucket, length: int) -> int:
        num_text = bucket.text.shape[1] - self._lengths[0] + length
        return max(2, self._tokens_per_batch // (bucket.num_image + num_text))

    def _loss(self, bucket: Bucket, length: int) -> tuple[torch.Tensor, int]:
        """Mean squared error on the velocity of a random batch, and the batch's size."""
        n = self._batch_size(bucket, length)
        chosen = torch.randint(len(bucket.latents), (n,), device=self._device)
        text, pooled = bucket.text[chosen], bucket.pooled[chosen]
        if length != self._lengths[0]:
            with torch.no_grad():
                t5_ids = F.pad(bucket.t5_ids[chosen], (0, length - bucket.t5_ids.shape[1]))
                text, pooled = self._model.encode(self._pipeline, bucket.clip_ids[chosen], t5_ids)
        clean = bucket.latents[chosen].float()
        noise = torch.randn_like(clean)
        sigma = sample_sigmas(n, clean.shape[1], self._device)
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        reference = None if bucket.references is None else bucket.references[chosen].float()
        inputs = Inputs(noisy, sigma, text, pooled, (bucket.width, bucket.height), reference)
        target = self._target(inputs, noise - clean, bucket, chosen, length)
        return F.mse_loss(self._forward(inputs), target), n

    def _target(
        self, inputs: Inputs, velocity: torch.Tensor, bucket: Bucket, chosen: torch.Tensor, length: int
    ) -> torch.Tensor:
        """What the transformer should say: the `velocity` from the clean latents to the noise, or its teacher's.

        `chosen`: which examples of the bucket these are; `length` of their text.
        """
        if self._teacher is None:
            return velocity
        return self._teacher.guided(inputs, self._guidance).detach()

    def _step(self) -> tuple[str, torch.Tensor, int]:
        """The name under which the loss is logged, the loss and the batch's size."""
        bucket = self._buckets[self._rng.choice(len(self._buckets), p=self._shares)]
        length = int(self._rng.choice(self._lengths, p=self._length_shares))
        loss, n = self._loss(bucket, length)
        loss.backward()
        processes.average_gradients(list(self.transformer.parameters()))
        nn.utils.clip_grad_norm_(self.transformer.parameters(), 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return "loss" if bucket.references is None else "edit_loss", loss.detach(), n

    @torch.no_grad()
    def _update_average(self, decay: float) -> None:
        source = [p.detach() for p in self.transformer.parameters()]
        torch._foreach_lerp_(list(self.average.parameters()), source, 1 - decay)
