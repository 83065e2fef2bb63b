"""Training examples: scenes that are not held out, their placing, and their captions as token ids.

Owns the conversion of captions to arrays; runs on the CPU, in several processes if asked.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, fields
from multiprocessing import get_context
from typing import Any

import numpy as np

from benchmarks.embedded_model.captions import CaptionWriter, Chunks
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


Maker = Callable[[int, int, int, int], Any]
"""Seed, number, width and height -> examples, a dataclass of arrays and scenes."""


def joined(parts: Sequence[Any]) -> Any:
    """Examples of one class, one behind the other."""
    columns = ([getattr(part, field.name) for part in parts] for field in fields(parts[0]))
    return type(parts[0])(
        *(concatenate(column) if isinstance(column[0], SceneArrays) else np.concatenate(column) for column in columns)
    )


class ExamplePool:
    """Makes the examples of every bucket in background processes, in parts of at most `PART` examples."""

    PART = 4000

    def __init__(
        self, buckets: Mapping[tuple[int, int], BucketPlan], make: Maker, seed: int, scale: float, num_processes: int
    ) -> None:
        self._pool = ProcessPoolExecutor(num_processes, mp_context=get_context("spawn"))
        self._make = make
        self._parts = {
            (width, height): self._submit(100 * seed + i, max(8, int(scale * 1000 * plan.thousands)), width, height)
            for i, ((width, height), plan) in enumerate(buckets.items())
        }

    def _submit(self, seed: int, n: int, width: int, height: int) -> list[Future]:
        counts = [min(self.PART, n - first) for first in range(0, n, self.PART)]
        return [self._pool.submit(self._make, 1000 * seed + i, count, width, height) for i, count in enumerate(counts)]

    def collect(self) -> dict[tuple[int, int], Any]:
        """Wait for all of them; by (width, height)."""
        examples = {size: joined([future.result() for future in futures]) for size, futures in self._parts.items()}
        self._pool.shutdown()
        return examples


def encode_captions(scenes: SceneArrays, writer: CaptionWriter) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One caption a scene: T5 ids (N, 64), CLIP ids (N, 77), T5 token owners (N, 64); padded, cut as diffusers does."""
    return encode_chunks([writer.chunks(scenes.scene(i)) for i in range(len(scenes))])


def encode_chunks(
    texts_of: Sequence[Chunks], more_words: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `encode_captions`, of any texts, by tokenizers that have some more words."""
    t5, clip = t5_tokenizer(more_words).backend_tokenizer, clip_tokenizer(more_words)
    texts, char_owners = [], []
    for chunks in texts_of:
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
