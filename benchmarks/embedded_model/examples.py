"""Training examples: scenes that are not held out, their placing, and their captions as token ids.

Owns the conversion of captions to arrays; runs on the CPU, in several processes if asked.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, fields
from multiprocessing import get_context

import numpy as np

from benchmarks.embedded_model.captions import CaptionWriter
from benchmarks.embedded_model.scenes import SceneArrays, concatenate, held_out_masks, place, sample_scenes
from benchmarks.embedded_model.tokenizer_files import CLIP_MAX_TOKENS, clip_tokenizer, t5_tokenizer

TEXT_TOKENS = 64
NOBODY, BACKGROUND = 3, 4  # owners of a token besides things 0..2


@dataclass(frozen=True)
class BucketPlan:
    """How much of the training one picture size gets."""

    share: float
    """Of the training steps."""
    thousands: int
    """Of pictures."""


@dataclass
class Examples:
    """N examples: the scenes, centres (N, 3, 2), token ids of T5 (N, 64) and CLIP (N, 77), owners of T5's tokens."""

    scenes: SceneArrays
    centres: np.ndarray
    t5_ids: np.ndarray
    clip_ids: np.ndarray
    owners: np.ndarray

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index) -> "Examples":
        return Examples(*(getattr(self, field.name)[index] for field in fields(self)))


def make_examples(
    seed: int, n: int, width: int, height: int, caption_writer: type[CaptionWriter] = CaptionWriter
) -> Examples:
    """N examples for pictures of the given proportions, none of them held out."""
    rng = np.random.default_rng(seed)
    shorter = min(width, height)
    scenes, centres = [], []
    while sum(map(len, scenes)) < n:
        drawn = sample_scenes(rng, 2 * n + 16)
        has_thing, has_pair = held_out_masks(drawn)
        drawn = drawn[~(has_thing | has_pair)]
        where, fits = place(rng, drawn, width / shorter, height / shorter)
        scenes.append(drawn[fits])
        centres.append(where[fits])
    chosen, placed = concatenate(scenes)[:n], np.concatenate(centres)[:n]
    return Examples(chosen, placed.astype(np.float32), *encode_captions(chosen, caption_writer(seed)))


class ExamplePool:
    """Makes the examples of every bucket in background processes, in parts of at most `PART` examples."""

    PART = 4000

    def __init__(
        self,
        buckets: Mapping[tuple[int, int], BucketPlan],
        caption_writer: type[CaptionWriter],
        seed: int,
        scale: float,
        num_processes: int,
    ):
        self._pool = ProcessPoolExecutor(num_processes, mp_context=get_context("spawn"))
        self._caption_writer = caption_writer
        self._parts = {
            (width, height): self._submit(100 * seed + i, max(8, int(scale * 1000 * plan.thousands)), width, height)
            for i, ((width, height), plan) in enumerate(buckets.items())
        }

    def _submit(self, seed: int, n: int, width: int, height: int) -> list[Future]:
        counts = [min(self.PART, n - first) for first in range(0, n, self.PART)]
        return [
            self._pool.submit(make_examples, 1000 * seed + i, count, width, height, self._caption_writer)
            for i, count in enumerate(counts)
        ]

    def collect(self) -> dict[tuple[int, int], Examples]:
        """Wait for all of them; by (width, height)."""
        examples = {}
        for size, futures in self._parts.items():
            parts = [future.result() for future in futures]
            arrays = (np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Examples)[1:])
            examples[size] = Examples(concatenate([p.scenes for p in parts]), *arrays)
        self._pool.shutdown()
        return examples


def encode_captions(scenes: SceneArrays, writer: CaptionWriter) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One caption a scene: T5 ids (N, 64), CLIP ids (N, 77), T5 token owners (N, 64); padded, cut as diffusers does."""
    t5, clip = t5_tokenizer().backend_tokenizer, clip_tokenizer()
    texts, char_owners = [], []
    for i in range(len(scenes)):
        chunks = writer.chunks(scenes.scene(i))
        texts.append("".join(text for text, _ in chunks))
        char_owners.append([_owner_index(owner) for text, owner in chunks for _ in text])
    t5_ids = np.zeros((len(texts), TEXT_TOKENS), np.int16)
    owners = np.full((len(texts), TEXT_TOKENS), NOBODY, np.int8)
    for i, encoding in enumerate(t5.encode_batch(texts)):
        ids = encoding.ids if len(encoding.ids) <= TEXT_TOKENS else [*encoding.ids[: TEXT_TOKENS - 1], encoding.ids[-1]]
        t5_ids[i, : len(ids)] = ids
        for k, (_, end) in enumerate(encoding.offsets[: len(ids) - 1]):
            owners[i, k] = char_owners[i][max(end - 1, 0)]
    end = clip.eos_token_id
    clip_ids = np.full((len(texts), CLIP_MAX_TOKENS), end, np.int16)
    for i, encoding in enumerate(clip.backend_tokenizer.encode_batch(texts)):
        ids = encoding.ids[: CLIP_MAX_TOKENS - 1]
        clip_ids[i, : len(ids)] = ids
    return t5_ids, clip_ids, owners


def _owner_index(owner: int | str | None) -> int:
    if owner is None:
        return NOBODY
    return BACKGROUND if owner == "background" else int(owner)
