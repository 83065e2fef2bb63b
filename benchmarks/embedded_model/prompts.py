"""The evaluation's prompt sets: held out by combination, fitting the picture, drawn from fixed seeds."""

from dataclasses import dataclass

import numpy as np

from benchmarks.embedded_model.captions import CaptionWriter, canonical
from benchmarks.embedded_model.scenes import concatenate, held_out_masks, place, sample_scenes
from benchmarks.embedded_model.world import Scene


@dataclass(frozen=True)
class PromptSet:
    """`num_things` per scene at `width` x `height`; `wording` canonical or free; text padded to `text_tokens`."""

    name: str
    num_things: int
    width: int = 256
    height: int = 256
    text_tokens: int = 64
    wording: str = "canonical"
    seed: int = 0


PROMPT_SETS = (
    PromptSet("one", 1, seed=101),
    PromptSet("two", 2, seed=102),
    PromptSet("three", 3, seed=103),
    PromptSet("one at 128x128", 1, 128, 128, seed=104),
    PromptSet("one at 512x512", 1, 512, 512, seed=105),
    PromptSet("one at 512x256", 1, 512, 256, seed=106),
    PromptSet("two at 512 text tokens", 2, text_tokens=512, seed=107),
    PromptSet("two, free wording", 2, wording="free", seed=108),
    PromptSet("three, free wording", 3, wording="free", seed=109),
    PromptSet("two at 512x512", 2, 512, 512, seed=110),
    PromptSet("two at 128x128", 2, 128, 128, seed=111),
    PromptSet("two at 320x448", 2, 320, 448, seed=112),
)


def make_prompts(prompts: PromptSet, n: int) -> list[tuple[str, Scene]]:
    """N prompts with their scenes. One thing: its (colour, shape, size) is held out; more: some pair of them is.

    Two and three things always have their relations said ("two-object relation prompts").
    """
    rng = np.random.default_rng(prompts.seed)
    shorter = min(prompts.width, prompts.height)
    shares = np.eye(3)[prompts.num_things - 1]
    kept = []
    while sum(map(len, kept)) < n:
        scenes = sample_scenes(rng, 4000, shares)
        has_thing, has_pair = held_out_masks(scenes)
        _, fits = place(rng, scenes, prompts.width / shorter, prompts.height / shorter)
        is_related = (scenes.relation[:, : prompts.num_things - 1] >= 0).all(1)
        kept.append(scenes[(has_thing if prompts.num_things == 1 else has_pair) & fits & is_related])
    chosen = concatenate(kept)[:n]
    writer = CaptionWriter(prompts.seed)
    scenes = [chosen.scene(i) for i in range(n)]
    return [(canonical(s) if prompts.wording == "canonical" else writer.write(s), s) for s in scenes]
