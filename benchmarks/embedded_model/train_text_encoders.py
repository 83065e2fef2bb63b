"""Pre-trains both text encoders to tag captions: which thing each token belongs to, and what is said of it.

The T5 class must say it per token (the thing's colour, shape, size and number; everywhere the relations, the count and
the background), the CLIP class for the whole scene from its pooled output. Linear heads, thrown away afterwards.
"""

import time

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextModel, T5EncoderModel

from benchmarks.embedded_model.architecture import CLIP_WIDTH, T5_WIDTH
from benchmarks.embedded_model.examples import Examples
from benchmarks.embedded_model.training_clock import Clock, log

LEARNING_RATE = 2e-3
NUM_CLASSES = {"colour": 11, "shape": 9, "size": 4, "relation": 5, "background": 6, "count": 4, "owner": 5}
TEXT_LENGTHS, LENGTH_SHARES = (64, 128, 512), (0.92, 0.04, 0.04)


class TokenTagger(nn.Module):
    """Linear heads on each T5 token vector (B, L, 128)."""

    def __init__(self):
        super().__init__()
        names = ("colour", "shape", "size", "owner", "relation_0", "relation_1", "background", "count")
        self.heads = nn.ModuleDict({n: nn.Linear(T5_WIDTH, NUM_CLASSES[n.split("_")[0]]) for n in names})

    def loss(self, tokens: torch.Tensor, tags: dict, owners: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy, and the share of scenes whose owned tokens are all tagged right."""
        length = tokens.shape[1]
        owners = F.pad(owners, (0, length - owners.shape[1]), value=3)[:, :length]
        owned = owners < 3
        losses, right = [], torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        for name, head in self.heads.items():
            logits = head(tokens).float()
            if name in ("colour", "shape", "size"):
                target = torch.gather(tags[name], 1, owners.clamp(max=2)).masked_fill(~owned, -100)
            elif name == "owner":
                target = owners
            else:
                target = tags[name][:, None].expand(-1, length)
            losses.append(F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100))
            right &= ((logits.argmax(-1) == target) | ~owned).all(1)
        return sum(losses), right.float().mean()


class SceneTagger(nn.Module):
    """Linear heads on the CLIP class's pooled vector (B, 96)."""

    def __init__(self):
        super().__init__()
        names = [f"{name}_{k}" for name in ("colour", "shape", "size") for k in range(3)]
        names += ["relation_0", "relation_1", "background", "count"]
        self.heads = nn.ModuleDict({n: nn.Linear(CLIP_WIDTH, NUM_CLASSES[n.split("_")[0]]) for n in names})

    def loss(self, pooled: torch.Tensor, tags: dict) -> tuple[torch.Tensor, torch.Tensor]:
        losses, right = [], torch.ones(len(pooled), dtype=torch.bool, device=pooled.device)
        for name, head in self.heads.items():
            stem, _, number = name.partition("_")
            target = tags[stem][:, int(number)] if stem in ("colour", "shape", "size") else tags[name]
            logits = head(pooled).float()
            losses.append(F.cross_entropy(logits, target))
            right &= logits.argmax(-1) == target
        return sum(losses), right.float().mean()


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
    t5: T5EncoderModel, clip: CLIPTextModel, examples: Examples, seconds: float, device: torch.device, batch_size: int
) -> None:
    """Train both in place."""
    taggers = nn.ModuleList([TokenTagger(), SceneTagger()]).to(device)
    t5.to(device).train()
    clip.to(device).train()
    parameters = [*t5.parameters(), *clip.parameters(), *taggers.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    tags, owners = tags_of(examples, device), torch.as_tensor(examples.owners, device=device).long()
    t5_ids = torch.as_tensor(examples.t5_ids, device=device).long()
    clip_ids = torch.as_tensor(examples.clip_ids, device=device).long()
    shares = torch.tensor(LENGTH_SHARES)
    clock, step, began = Clock(seconds, warmup_steps=100, hold=0.4), 0, time.time()
    while clock.tick():
        length = TEXT_LENGTHS[int(torch.multinomial(shares, 1))]
        chosen = torch.randint(len(examples), (max(8, batch_size * 64 // length),), device=device)
        batch_tags = {name: values[chosen] for name, values in tags.items()}
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * clock.rate(step)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            tokens = t5(F.pad(t5_ids[chosen], (0, length - t5_ids.shape[1]))).last_hidden_state
            pooled = clip(clip_ids[chosen]).pooler_output
            token_loss, token_right = taggers[0].loss(tokens, batch_tags, owners[chosen])
            scene_loss, scene_right = taggers[1].loss(pooled, batch_tags)
        optimizer.zero_grad(set_to_none=True)
        (token_loss + scene_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 250 == 0:
            log(
                "text",
                step=step,
                length=length,
                token_loss=token_loss,
                token_right=token_right,
                scene_loss=scene_loss,
                scene_right=scene_right,
                seconds=time.time() - began,
            )
        step += 1
    log(
        "text",
        step=step,
        token_loss=token_loss,
        token_right=token_right,
        scene_loss=scene_loss,
        scene_right=scene_right,
        seconds=time.time() - began,
    )
    t5.eval()
    clip.eval()
