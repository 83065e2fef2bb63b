"""Pairs of scenes that one instruction leads from and to, as arrays: what is sampled, placed, held out.

A thing keeps its slot and the centre of its bounding box through an edit, so one array of centres serves both pictures.
"""

from dataclasses import dataclass, replace

import numpy as np

from benchmarks.embedded_model.instructions import OPERATIONS, SLOTS, Edit, unique_descriptions
from benchmarks.embedded_model.scenes import (
    BACKGROUND_NAMES,
    COLOUR_NAMES,
    EDGE,
    GAP,
    HALF_HEIGHT,
    HALF_WIDTH,
    SIZE_NAMES,
    SceneArrays,
    place,
    sample_scenes,
)
from benchmarks.embedded_model.world import SHAPES, SIZES, Scene, Thing, is_held_out

SHARES = {"colour": 0.2, "size": 0.2, "shape": 0.14, "remove": 0.14, "add": 0.2, "background": 0.12}
SHARE_WITH_RELATION = 0.8
"""Of the things that are added where there is another."""
LEAST_DISTANCE = 0.06
"""Between the centres of things of which one is said to be left of, above, … the other."""
COUNTS = (0.24, 0.42, 0.34)
"""Shares of scenes with one, two and three things."""
Centres = np.ndarray
"""[SLOTS, 2], in units of the picture's shorter side."""


@dataclass
class PlacedEdits:
    """Edits with where their things are: `centres` (N, 3, 2)."""

    edits: list[Edit]
    centres: np.ndarray

    def __len__(self) -> int:
        return len(self.edits)


def scenes_of(edits: list[Edit], which: str) -> SceneArrays:
    """The scenes "before" or "after", by slot: holes are left where nobody is."""
    n = len(edits)
    arrays = SceneArrays(*(np.full((n, 3), -1) for _ in range(3)), relation=np.full((n, 2), -1), background=np.zeros(n))
    arrays.background = np.array([BACKGROUND_NAMES.index(edit.backgrounds[which == "after"]) for edit in edits], int)
    for i, edit in enumerate(edits):
        for k, thing in enumerate(getattr(edit, which)):
            if thing is not None:
                arrays.colour[i, k] = COLOUR_NAMES.index(thing.colour)
                arrays.shape[i, k] = SHAPES.index(thing.shape)
                arrays.size[i, k] = SIZE_NAMES.index(thing.size)
    return arrays


def scene_of(edit: Edit, which: str) -> Scene:
    """The things there are, in no relation."""
    things = tuple(thing for thing in getattr(edit, which) if thing is not None)
    return Scene(things, (None,) * max(len(things) - 1, 0), edit.backgrounds[which == "after"])


def make_edits(rng: np.random.Generator, n: int, width: int, height: int, held_out: bool = False) -> PlacedEdits:
    """N edits for pictures of these proportions, none of whose scenes is held out; or, with `held_out`, each of which
    has one that is."""
    shorter = min(width, height)
    edits: list[Edit] = []
    centres: list[np.ndarray] = []
    while len(edits) < n:
        drawn = sample_scenes(rng, 512, COUNTS)
        where, fits = place(rng, drawn, width / shorter, height / shorter)
        operations = rng.choice(len(OPERATIONS), len(drawn), p=[SHARES[name] for name in OPERATIONS])
        for i in np.flatnonzero(fits):
            edit = _edit(rng, drawn.scene(i), where[i], OPERATIONS[operations[i]], (width / shorter, height / shorter))
            if edit is not None and held_out == any(is_held_out(scene_of(edit, w)) for w in ("before", "after")):
                edits.append(edit)
                centres.append(where[i])
    return PlacedEdits(edits[:n], np.stack(centres[:n]).astype(np.float32))


def _edit(
    rng: np.random.Generator, scene: Scene, centres: Centres, operation: str, lengths: tuple[float, float]
) -> Edit | None:
    """A random one of this kind; None if what was drawn cannot be done or said."""
    things: tuple[Thing | None, ...] = (*scene.things, *[None] * (SLOTS - len(scene.things)))
    grounds = (scene.background, scene.background)
    if operation == "background":
        new = str(rng.choice([name for name in BACKGROUND_NAMES if name != scene.background]))
        is_seen = all(thing.colour != new for thing in scene.things)
        return Edit(operation, things, things, (scene.background, new), None) if is_seen else None
    slot = int(rng.integers(len(scene.things)))
    if operation in ("add", "remove") and len(scene.things) == 1:
        return None  # the autoencoder has never seen an empty picture, and makes another colour of one
    without = tuple(None if i == slot else thing for i, thing in enumerate(things))
    if operation == "add":
        return _added(rng, things, without, slot, centres, grounds)
    if not unique_descriptions(things, slot):
        return None
    if operation == "remove":
        return Edit(operation, things, without, grounds, slot)
    changed = _changed(rng, scene.things[slot], operation)
    after = tuple(changed if i == slot else thing for i, thing in enumerate(things))
    if changed.colour == scene.background or not _fits(after, slot, centres, lengths):
        return None
    return Edit(operation, things, after, grounds, slot)


def _changed(rng: np.random.Generator, thing: Thing, operation: str) -> Thing:
    def other(names: tuple[str, ...], than: str) -> str:
        return str(rng.choice([name for name in names if name != than]))

    if operation == "colour":
        return replace(thing, colour=other(COLOUR_NAMES, thing.colour))
    if operation == "size":
        return replace(thing, size=other(SIZE_NAMES, thing.size))
    colour = other(COLOUR_NAMES, thing.colour) if rng.random() < 0.2 else thing.colour
    return replace(thing, shape=other(SHAPES, thing.shape), colour=colour)


def _added(
    rng: np.random.Generator,
    things: tuple[Thing | None, ...],
    without: tuple[Thing | None, ...],
    slot: int,
    centres: Centres,
    grounds: tuple[str, str],
) -> Edit | None:
    anchors = [i for i, thing in enumerate(without) if thing is not None and unique_descriptions(without, i)]
    if not anchors or rng.random() >= SHARE_WITH_RELATION:
        return Edit("add", without, things, grounds, slot)
    anchor = int(rng.choice(anchors))
    relation = _relation(things, centres, slot, anchor)
    return None if relation is None else Edit("add", without, things, grounds, slot, anchor, relation)


def half_extent(thing: Thing) -> np.ndarray:
    """Half the bounding box: (width, height) in units of the picture's shorter side."""
    shape = SHAPES.index(thing.shape)
    return SIZES[thing.size] * np.array([HALF_WIDTH[shape], HALF_HEIGHT[shape]])


def _relation(things: tuple[Thing | None, ...], centres: Centres, slot: int, anchor: int) -> str | None:
    """Where the thing in `slot` is, seen from `anchor`: along the axis on which they are further apart."""
    new, old = things[slot], things[anchor]
    assert new is not None and old is not None
    offset = centres[slot] - centres[anchor]
    axis = int(np.argmax(np.abs(offset)))
    apart = abs(offset[axis]) - half_extent(new)[axis] - half_extent(old)[axis]
    if apart < 0 or abs(offset[axis]) < LEAST_DISTANCE:
        return None
    return (("left", "right"), ("above", "below"))[axis][int(offset[axis] > 0)]


def _fits(things: tuple[Thing | None, ...], slot: int, centres: Centres, lengths: tuple[float, float]) -> bool:
    """Whether the thing in `slot` is inside and apart from the others."""
    new = things[slot]
    assert new is not None
    half, centre = half_extent(new), centres[slot]
    if (centre - half < EDGE).any() or (centre + half > np.array(lengths) - EDGE).any():
        return False
    others = ((thing, centres[i]) for i, thing in enumerate(things) if thing is not None and i != slot)
    return all((np.abs(centre - place) > half + half_extent(thing) + GAP).any() for thing, place in others)
