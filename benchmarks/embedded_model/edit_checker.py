"""Looks at a picture before and after an edit and says whether what was asked for, and nothing else, has changed.

Both are looked at by `checker.look`; the renderer's own numbers are not used. Unchanged things must be what and where
they were; outside the boxes of what changed, no pixel may have a colour that nothing near it had before.
"""

from dataclasses import dataclass
from itertools import permutations, product

import numpy as np
from scipy import ndimage

from benchmarks.embedded_model.checker import SIZE_TOLERANCE, Seen, _holds, check, look
from benchmarks.embedded_model.edits import scene_of
from benchmarks.embedded_model.instructions import Edit
from benchmarks.embedded_model.world import BACKGROUNDS, SIZES, Thing, rgb

BOX_TOLERANCE = 0.025
"""By which an edge of an unchanged thing's box may move, and the centre of a changed one's: of the shorter side."""
MARGIN = 0.03
"""Around the boxes of what changed, within which pixels may differ: of the shorter side."""
REACH_PX = 2
"""How far off a pixel may find its colour in the picture before: edges are soft."""
COLOUR_DISTANCE = 45.0
"""Euclidean, in 0..255 RGB, up to which colours are the same."""
FOREGROUND_DISTANCE = 26.0
MAX_CHANGED_SHARE = 0.001
"""Of the pixels that should have stayed, at a shorter side of 256; a smaller picture's soft edges are more of it."""


@dataclass
class EditVerdict:
    """Which requirements a picture meets; `is_right` when all of them."""

    background: bool = False
    count: bool = False
    others: bool = False
    """Unchanged things are what and where they were."""
    change: bool = False
    """The changed thing is what was asked for."""
    pixels: bool = False
    """Nothing has changed elsewhere."""

    @property
    def is_right(self) -> bool:
        return self.background and self.count and self.others and self.change and self.pixels


def check_edit(before: np.ndarray, after: np.ndarray, edit: Edit) -> EditVerdict:
    """Judge an RGB picture (height, width, 3), uint8, that an edit is said to have made of `before`.

    Raises ValueError if `before` does not show what the edit begins with, or if the sizes differ.
    """
    if before.shape != after.shape:
        raise ValueError(f"the pictures' shapes {before.shape} and {after.shape} differ")
    shorter = min(before.shape[:2])
    was = _slots(before, edit)
    ground, seen = look(after)
    slots = [i for i, thing in enumerate(edit.after) if thing is not None]
    verdict = EditVerdict(background=ground == edit.backgrounds[1], count=len(seen) == len(slots))
    if not verdict.count:
        return verdict
    arrangements = (dict(zip(slots, order, strict=True)) for order in permutations(seen))
    marks = max(
        ((*_compare(is_now, was, edit, shorter), is_now) for is_now in arrangements),
        key=lambda mark: (mark[0] and mark[1], mark[0] + mark[1]),
    )
    verdict.others, verdict.change, is_now = marks
    verdict.pixels = _share_changed(before, after, edit, was, is_now) <= MAX_CHANGED_SHARE * 256 / shorter
    return verdict


def _slots(picture: np.ndarray, edit: Edit) -> dict[int, Seen]:
    """What is seen in the picture before, by slot."""
    if not check(picture, scene_of(edit, "before")).is_right:
        raise ValueError("the picture before does not show what the edit begins with")
    shorter, seen = min(picture.shape[:2]), look(picture)[1]
    slots = [i for i, thing in enumerate(edit.before) if thing is not None]
    for order in permutations(seen):
        if all(_is(one, edit.before[i], shorter) for i, one in zip(slots, order, strict=True)):
            return {i: one for i, one in zip(slots, order, strict=True) if one is not None}
    raise ValueError("the picture before does not show what the edit begins with")


def _is(seen: Seen | None, thing: Thing | None, shorter: int) -> bool:
    if seen is None or thing is None or (seen.colour, seen.shape) != (thing.colour, thing.shape):
        return False
    return abs(seen.side / (SIZES[thing.size] * shorter) - 1) <= SIZE_TOLERANCE


def _compare(is_now: dict[int, Seen | None], was: dict[int, Seen], edit: Edit, shorter: int) -> tuple[bool, bool]:
    """Whether the others are as before, and whether the change is as asked for."""
    reach = BOX_TOLERANCE * shorter
    others = all(
        _is(seen, edit.after[i], shorter) and seen is not None and _max_move(seen, was[i]) <= reach
        for i, seen in is_now.items()
        if i != edit.changed
    )
    if edit.changed is None or edit.after[edit.changed] is None:
        return others, True
    new = is_now[edit.changed]
    if new is None or not _is(new, edit.after[edit.changed], shorter):
        return others, False
    if edit.operation == "add":
        return others, edit.anchor is None or _holds(edit.relation, new, is_now[edit.anchor], shorter)
    old = was[edit.changed]
    distance = max(abs(a - b) for a, b in zip(_centre(new), _centre(old), strict=True))
    return others, distance <= reach


def _max_move(seen: Seen, was: Seen) -> float:
    return max(abs(a - b) for a, b in zip(seen.box, was.box, strict=True))


def _centre(seen: Seen) -> tuple[float, float]:
    return (seen.box[0] + seen.box[2]) / 2, (seen.box[1] + seen.box[3]) / 2


def _share_changed(
    before: np.ndarray, after: np.ndarray, edit: Edit, was: dict[int, Seen], is_now: dict[int, Seen | None]
) -> float:
    """Of the pixels that should be as before (on another background, if that is what changes): those that are not."""
    expected, stays = before.astype(float), np.ones(before.shape[:2], bool)
    if edit.operation == "background":
        ground = np.array(rgb(BACKGROUNDS[edit.backgrounds[0]]), float)
        foreground = np.linalg.norm(expected - ground, axis=-1) > FOREGROUND_DISTANCE
        expected[~foreground] = rgb(BACKGROUNDS[edit.backgrounds[1]])
        edge = ndimage.binary_dilation(foreground, iterations=2) & ~ndimage.binary_erosion(foreground, iterations=2)
        stays &= ~edge
    margin = MARGIN * min(before.shape[:2])
    for seen in (was.get(edit.changed), is_now.get(edit.changed)) if edit.changed is not None else ():
        if seen is not None:
            left, top, right, bottom = seen.box
            rows = slice(max(0, int(top - margin)), int(bottom + margin) + 1)
            stays[rows, max(0, int(left - margin)) : int(right + margin) + 1] = False
    nearest = np.full(before.shape[:2], np.inf)
    padded = np.pad(expected, ((REACH_PX, REACH_PX), (REACH_PX, REACH_PX), (0, 0)), mode="edge")
    height, width = before.shape[:2]
    for y, x in product(range(2 * REACH_PX + 1), repeat=2):
        distance = np.linalg.norm(after - padded[y : y + height, x : x + width], axis=-1)
        nearest = np.minimum(nearest, distance)
    return float((nearest > COLOUR_DISTANCE)[stays].sum() / max(stays.sum(), 1))
