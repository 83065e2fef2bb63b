"""Training examples of edits: both scenes, their placing, the instruction as token ids and what it says."""

from dataclasses import dataclass, fields

import numpy as np

from benchmarks.embedded_model.edits import make_edits, scenes_of
from benchmarks.embedded_model.examples import encode_chunks
from benchmarks.embedded_model.instructions import (
    ANCHOR,
    TAGS,
    TARGET,
    VALUE,
    Instruction,
    InstructionWriter,
    instruction_words,
)
from benchmarks.embedded_model.scenes import BACKGROUND_NAMES, COLOUR_NAMES, SIZE_NAMES, SceneArrays
from benchmarks.embedded_model.world import RELATIONS, SHAPES

NAMES = {"colour": COLOUR_NAMES, "shape": SHAPES, "size": SIZE_NAMES}


@dataclass
class EditExamples:
    """N examples: scenes, centres (N, 3, 2), token ids of T5 (N, 64) and CLIP (N, 77), owners of T5's tokens.

    What is said, 0 for nothing: `colour`, `shape`, `size` (N, 3) of target, value and anchor; `relation`, `ground`,
    `operation` (N,), the last one an index of `TAGS`.
    """

    before: SceneArrays
    after: SceneArrays
    centres: np.ndarray
    t5_ids: np.ndarray
    clip_ids: np.ndarray
    owners: np.ndarray
    colour: np.ndarray
    shape: np.ndarray
    size: np.ndarray
    relation: np.ndarray
    ground: np.ndarray
    operation: np.ndarray

    def __len__(self) -> int:
        return len(self.owners)

    def __getitem__(self, index) -> "EditExamples":
        return EditExamples(*(getattr(self, field.name)[index] for field in fields(self)))


def make_edit_examples(seed: int, n: int, width: int, height: int) -> EditExamples:
    """N examples for pictures of the given proportions, none of them held out."""
    placed = make_edits(np.random.default_rng(seed), n, width, height)
    writer = InstructionWriter(seed)
    said = [writer.write(edit) for edit in placed.edits]
    ids = encode_chunks([instruction.chunks for instruction in said], instruction_words())
    before, after = (scenes_of(placed.edits, which) for which in ("before", "after"))
    return EditExamples(before, after, placed.centres, *ids, *_tags(said))


def _tags(said: list[Instruction]) -> list[np.ndarray]:
    things = {name: np.zeros((len(said), 3), int) for name in NAMES}
    relation, ground, operation = (np.zeros(len(said), int) for _ in range(3))
    for i, instruction in enumerate(said):
        for owner in (TARGET, VALUE, ANCHOR):
            for name, value in instruction.said.get(owner, {}).items():
                things[name][i, owner] = 1 + NAMES[name].index(value)
        relation[i] = 0 if instruction.relation is None else 1 + RELATIONS.index(instruction.relation)
        ground[i] = 0 if instruction.background is None else 1 + BACKGROUND_NAMES.index(instruction.background)
        operation[i] = TAGS.index(instruction.tag)
    return [*things.values(), relation, ground, operation]
