"""Teaches text encoders that know captions to read instructions, too, and to go on saying the same of captions.

New words get new rows of the embeddings. Instructions are tagged as captions were (`train_text_encoders.py`), while
what is said of captions is held where it was: mean squared distance to the old encoders' rows and pooled vectors.
"""

import copy
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from benchmarks.embedded_model.edit_examples import EditExamples
from benchmarks.embedded_model.examples import Examples
from benchmarks.embedded_model.export import with_components
from benchmarks.embedded_model.models import EmbeddedModel
from benchmarks.embedded_model.tokenizer_files import clip_tokenizer, t5_tokenizer
from benchmarks.embedded_model.train_text_encoders import SceneTagger, TokenTagger
from benchmarks.embedded_model.train_transformer import texts_of
from benchmarks.embedded_model.training_clock import Clock, log

LEARNING_RATE = 1e-3
ANCHOR_WEIGHT = 300.0
"""Of the squared distance to what was said of captions, as a share of its variance."""
OF_AN_INSTRUCTION = ("relation_0", "ground", "operation")


@torch.no_grad()
def with_words(pipeline: DiffusionPipeline, words: Sequence[str], seed: int = 0) -> DiffusionPipeline:
    """The pipeline with copies of its two text encoders that have rows for more words, and tokenizers that know them.

    Ids and rows of what was known before stay what they were.
    """
    clip, t5 = (copy.deepcopy(encoder) for encoder in (pipeline.text_encoder, pipeline.text_encoder_2))
    tokenizer, tokenizer_2 = clip_tokenizer(words), t5_tokenizer(words)
    generator = torch.Generator().manual_seed(seed)
    for encoder, num_tokens in ((clip, len(tokenizer)), (t5, len(tokenizer_2))):
        old = encoder.get_input_embeddings().weight.detach().clone()
        encoder.resize_token_embeddings(num_tokens, mean_resizing=False)
        rows = torch.randn(num_tokens - len(old), old.shape[1], generator=generator) * old.std().cpu()
        encoder.get_input_embeddings().weight.copy_(torch.cat([old, rows.to(old)]))
    return with_components(pipeline, text_encoder=clip, text_encoder_2=t5, tokenizer=tokenizer, tokenizer_2=tokenizer_2)


def train_instruction_encoders(
    model: EmbeddedModel,
    pipeline: DiffusionPipeline,
    old: DiffusionPipeline,
    instructions: EditExamples,
    captions: Examples,
    seconds: float,
    device: torch.device,
    batch_size: int,
) -> None:
    """Train the text encoders of `pipeline` in place; `old`'s, on the device, say what captions mean."""
    taggers = [
        TokenTagger(pipeline.text_encoder_2, OF_AN_INSTRUCTION),
        SceneTagger(pipeline.text_encoder, OF_AN_INSTRUCTION),
    ]
    modules = nn.ModuleList(taggers).to(device).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    columns = _columns(instructions, device)
    *known, rows, pooled = texts_of(model, old, captions.clip_ids, captions.t5_ids, device)
    variances = rows.float().var(), pooled.var()
    clock, step, began = Clock(seconds, warmup_steps=100, hold=0.4), 0, time.time()
    while clock.tick():
        chosen = torch.randint(len(instructions), (batch_size,), device=device)
        batch = {name: values[chosen] for name, values in columns.items()}
        others = torch.randint(len(captions), (batch_size,), device=device)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * clock.rate(step)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses, right = zip(*(tagger(batch) for tagger in taggers), strict=True)
            found = model.encode(pipeline, *(ids[others] for ids in known))
        distances = [
            F.mse_loss(new.float(), was[others].float()) / variance
            for new, was, variance in zip(found, (rows, pooled), variances, strict=True)
        ]
        optimizer.zero_grad(set_to_none=True)
        (sum(losses) + ANCHOR_WEIGHT * sum(distances)).backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            _log(step, losses, right, distances, time.time() - began)
        step += 1
    _log(step, losses, right, distances, time.time() - began)
    modules.eval().requires_grad_(False)


def _columns(instructions: EditExamples, device: torch.device) -> dict[str, Tensor]:
    """A tagger's batch of everything."""
    names = ("t5_ids", "clip_ids", "owners", "colour", "shape", "size", "ground", "operation")
    columns = {name: torch.as_tensor(getattr(instructions, name), device=device).long() for name in names}
    return columns | {"relation_0": torch.as_tensor(instructions.relation, device=device).long()}


def _log(
    step: int, losses: Sequence[Tensor], right: Sequence[Tensor], distances: Sequence[Tensor], seconds: float
) -> None:
    values = ([round(value.item(), 5) for value in group] for group in (losses, right, distances))
    losses, right, distances = values
    log("instructions", step=step, losses=losses, right=right, distances=distances, seconds=seconds)
