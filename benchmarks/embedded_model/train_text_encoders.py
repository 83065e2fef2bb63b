"""Pre-trains text encoders to tag captions: which thing each token belongs to, and what is said of it.

The T5 class must say it per token (the thing's colour, shape, size and number; everywhere the relations, the count and
the background), the CLIP classes for the whole scene from their pooled output. Linear heads, thrown away afterwards.
"""

import time
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from benchmarks.embedded_model.examples import Examples
from benchmarks.embedded_model.instructions import TAGS
from benchmarks.embedded_model.training_clock import Clock, log

LEARNING_RATE = 2e-3
NUM_CLASSES = {"colour": 11, "shape": 9, "size": 4, "relation": 5, "background": 6, "count": 4, "owner": 5}
NUM_CLASSES |= {"operation": len(TAGS), "ground": 7}
OF_A_THING = ("colour", "shape", "size")
OF_A_CAPTION = ("relation_0", "relation_1", "background", "count")
COLUMNS = ("t5_ids", "clip_ids", "owners")
Batch = dict[str, Tensor]
"""Token ids (`t5_ids`, `clip_ids`), `owners` and the tags of `tags_of`, by name; a row is an example."""


class TokenTagger(nn.Module):
    """The T5 class with linear heads on each token vector (B, L, C)."""

    def __init__(self, encoder: T5EncoderModel, of_the_text: Sequence[str] = OF_A_CAPTION):
        super().__init__()
        self.encoder = encoder
        self.heads = heads((*OF_A_THING, "owner", *of_the_text), encoder.config.d_model)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy, and the share of scenes whose owned tokens are all tagged right."""
        tokens = self.encoder(batch["t5_ids"]).last_hidden_state
        length = tokens.shape[1]
        owners = F.pad(batch["owners"], (0, length - batch["owners"].shape[1]), value=3)[:, :length]
        owned = owners < 3
        losses, right = [], torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        for name, head in self.heads.items():
            logits = head(tokens).float()
            if name in OF_A_THING:
                target = torch.gather(batch[name], 1, owners.clamp(max=2)).masked_fill(~owned, -100)
            elif name == "owner":
                target = owners
            else:
                target = batch[name][:, None].expand(-1, length)
            losses.append(F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100))
            right &= ((logits.argmax(-1) == target) | ~owned).all(1)
        return sum(losses), right.float().mean()


class SceneTagger(nn.Module):
    """A CLIP class with linear heads on its pooled vector, the projected one where it has a projection."""

    def __init__(self, encoder: CLIPTextModel | CLIPTextModelWithProjection, of_the_text: Sequence[str] = OF_A_CAPTION):
        super().__init__()
        self.encoder = encoder
        self._is_projected = isinstance(encoder, CLIPTextModelWithProjection)
        names = [*(f"{name}_{k}" for name in OF_A_THING for k in range(3)), *of_the_text]
        self.heads = heads(names, encoder.config.projection_dim if self._is_projected else encoder.config.hidden_size)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy, and the share of scenes of which everything is said right."""
        output = self.encoder(batch["clip_ids"])
        pooled = output.text_embeds if self._is_projected else output.pooler_output
        losses, right = [], torch.ones(len(pooled), dtype=torch.bool, device=pooled.device)
        for name, head in self.heads.items():
            stem, _, number = name.partition("_")
            target = batch[stem][:, int(number)] if stem in OF_A_THING else batch[name]
            logits = head(pooled).float()
            losses.append(F.cross_entropy(logits, target))
            right &= logits.argmax(-1) == target
        return sum(losses), right.float().mean()


def heads(names: Sequence[str], width: int) -> nn.ModuleDict:
    """A linear layer for every tag."""
    return nn.ModuleDict({name: nn.Linear(width, NUM_CLASSES[name.split("_")[0]]) for name in names})


def tags_of(examples: Examples, device) -> dict[str, torch.Tensor]:
    """Class indices by name; absent things and free relations are class 0 of theirs."""
    scenes = examples.scenes

    def index(array):
        return torch.as_tensor(array, device=device).long()

    return {
        "colour": index(scenes.colour + 1),
        "shape": index(scenes.shape + 1),
        "size": index(scenes.size + 1),
        "relation_0": index(scenes.relation[:, 0] + 1),
        "relation_1": index(scenes.relation[:, 1] + 1),
        "background": index(scenes.background),
        "count": index((scenes.shape >= 0).sum(1)),
    }


def train_text_encoders(
    taggers: Sequence[nn.Module],
    examples: Examples,
    text_lengths: Mapping[int, float],
    seconds: float,
    device: torch.device,
    batch_size: int,
) -> None:
    """Train the taggers' encoders in place, T5's on captions padded to `text_lengths` (share of steps by length)."""
    models = nn.ModuleList(taggers).to(device).train()
    optimizer = torch.optim.AdamW(models.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    columns = {name: torch.as_tensor(getattr(examples, name), device=device).long() for name in COLUMNS}
    columns |= tags_of(examples, device)
    lengths, shares = list(text_lengths), torch.tensor(list(text_lengths.values()))
    clock, step, began = Clock(seconds, warmup_steps=100, hold=0.4), 0, time.time()
    while clock.tick():
        length = lengths[int(torch.multinomial(shares, 1))]
        chosen = torch.randint(len(examples), (max(8, batch_size * lengths[0] // length),), device=device)
        batch = {name: values[chosen] for name, values in columns.items()}
        batch["t5_ids"] = F.pad(batch["t5_ids"], (0, length - batch["t5_ids"].shape[1]))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * clock.rate(step)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses, right = zip(*(model(batch) for model in models), strict=True)
        optimizer.zero_grad(set_to_none=True)
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        if step % 250 == 0:
            log_tags(step, losses, right, time.time() - began)
        step += 1
    log_tags(step, losses, right, time.time() - began)
    models.eval()


def log_tags(step: int, losses: Sequence[Tensor], right: Sequence[Tensor], seconds: float) -> None:
    """The taggers' losses and shares of captions tagged right, in their order."""
    losses, right = ([round(value.item(), 4) for value in values] for values in (losses, right))
    log("text", step=step, losses=losses, right=right, seconds=seconds)
