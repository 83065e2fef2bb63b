"""Random scenes as integer arrays, and where their things go in a picture of given proportions (numpy, vectorised).

Lengths are in units of the picture's shorter side; x to the right, y downwards. -1 means absent (a thing) or free (a
relation). Knows nothing of words or pixels.
"""

from dataclasses import dataclass, fields

import numpy as np

from benchmarks.embedded_model.world import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_SHARE,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    is_held_out_pair,
    is_held_out_thing,
)

COLOUR_NAMES, BACKGROUND_NAMES, SIZE_NAMES = tuple(COLOURS), tuple(BACKGROUNDS), tuple(SIZES)
SIZE_VALUES = np.array(tuple(SIZES.values()))
EDGE, GAP = 0.015, 0.025  # least distance of a thing's bounding box to the edge and to the next thing
# half the bounding box of a shape of size 1 (its longer side is 1)
HALF_WIDTH = np.full(len(SHAPES), 0.5)
HALF_HEIGHT = np.array([{"triangle": 0.4330, "star": 0.4755, "heart": 0.4571}.get(shape, 0.5) for shape in SHAPES])


@dataclass
class SceneArrays:
    """N scenes: `colour`, `shape`, `size` (N, 3); `relation` (N, 2); `background` (N,); indices into world's tables."""

    colour: np.ndarray
    shape: np.ndarray
    size: np.ndarray
    relation: np.ndarray
    background: np.ndarray

    def __len__(self) -> int:
        return len(self.background)

    def __getitem__(self, index) -> "SceneArrays":
        return SceneArrays(*(getattr(self, field.name)[index] for field in fields(self)))

    def scene(self, i: int) -> Scene:
        num = int((self.shape[i] >= 0).sum())
        things = tuple(
            Thing(COLOUR_NAMES[self.colour[i, k]], SHAPES[self.shape[i, k]], SIZE_NAMES[self.size[i, k]])
            for k in range(num)
        )
        relations = tuple(RELATIONS[r] if r >= 0 else None for r in self.relation[i, : num - 1])
        return Scene(things, relations, BACKGROUND_NAMES[self.background[i]])


def concatenate(parts: list[SceneArrays]) -> SceneArrays:
    return SceneArrays(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(SceneArrays)))


def from_scenes(scenes: list[Scene]) -> SceneArrays:
    """The arrays of the given scenes."""
    n = len(scenes)
    arrays = SceneArrays(*(np.full(shape, -1) for shape in ((n, 3), (n, 3), (n, 3), (n, 2), (n,))))
    for i, scene in enumerate(scenes):
        for k, thing in enumerate(scene.things):
            arrays.colour[i, k] = COLOUR_NAMES.index(thing.colour)
            arrays.shape[i, k] = SHAPES.index(thing.shape)
            arrays.size[i, k] = SIZE_NAMES.index(thing.size)
        for k, relation in enumerate(scene.relations):
            arrays.relation[i, k] = -1 if relation is None else RELATIONS.index(relation)
        arrays.background[i] = BACKGROUND_NAMES.index(scene.background)
    return arrays


def sample_scenes(rng: np.random.Generator, n: int, share_of_counts=(0.42, 0.32, 0.26)) -> SceneArrays:
    """N visible scenes of one to three things, held-out ones among them."""
    count = rng.choice(3, n, p=share_of_counts) + 1
    present = np.arange(3) < count[:, None]
    background = rng.choice(6, n, p=[0.13, 0.35, 0.13, 0.13, 0.13, 0.13])
    colour = rng.integers(0, 10, (n, 3))
    is_hidden = (colour == COLOUR_NAMES.index("white")) & (background == BACKGROUND_NAMES.index("white"))[:, None]
    colour = np.where(is_hidden, rng.integers(0, 9, (n, 3)), colour)
    relation = np.where(rng.random((n, 2)) < 0.15, -1, rng.integers(0, 4, (n, 2)))
    return SceneArrays(
        colour=np.where(present, colour, -1),
        shape=np.where(present, rng.integers(0, len(SHAPES), (n, 3)), -1),
        size=np.where(present, rng.choice(3, (n, 3), p=[0.3, 0.4, 0.3]), -1),
        relation=np.where(present[:, 1:], relation, -1),
        background=background,
    )


def held_out_tables() -> tuple[np.ndarray, np.ndarray]:
    """Boolean tables: things (10, 8, 3) and unordered pairs of colour/shape (80, 80) that training must not show."""
    assert 0 < HELD_OUT_SHARE < 100
    things = np.array([[[is_held_out_thing(Thing(c, s, z)) for z in SIZE_NAMES] for s in SHAPES] for c in COLOUR_NAMES])
    kinds = [Thing(c, s) for c in COLOUR_NAMES for s in SHAPES]
    return things, np.array([[is_held_out_pair(a, b) for b in kinds] for a in kinds])


def held_out_masks(scenes: SceneArrays) -> tuple[np.ndarray, np.ndarray]:
    """For each scene: whether it has a held-out thing, and whether it has a held-out pair."""
    things, pairs = held_out_tables()
    present = scenes.shape >= 0
    has_thing = (things[scenes.colour, scenes.shape, scenes.size] & present).any(1)
    kind = scenes.colour * len(SHAPES) + scenes.shape
    has_pair = np.zeros(len(scenes), bool)
    for i, k in ((0, 1), (0, 2), (1, 2)):
        has_pair |= pairs[kind[:, i], kind[:, k]] & present[:, i] & present[:, k]
    return has_thing, has_pair


def place(rng: np.random.Generator, scenes: SceneArrays, width: float, height: float) -> tuple[np.ndarray, np.ndarray]:
    """Centres of bounding boxes (N, 3, 2), and whether the scene fits (N,), for a picture of width x height units."""
    n = len(scenes)
    sides = SIZE_VALUES[scenes.size]
    half = np.stack([HALF_WIDTH[scenes.shape] * sides, HALF_HEIGHT[scenes.shape] * sides], -1)
    relation = np.where(scenes.relation < 0, rng.integers(0, 4, (n, 2)), scenes.relation)
    count = (scenes.shape >= 0).sum(1)
    centres, fits = np.zeros((n, 3, 2)), np.zeros(n, bool)
    for first_axis in (0, 1):
        across = 1 - first_axis
        lengths = np.array([width, height])
        on_axis = relation[:, 0] // 2 == first_axis
        for case in ("one", "two", "row", "corner"):
            same_axis = relation[:, 1] // 2 == first_axis
            chosen = (
                on_axis
                & {
                    "one": count == 1,
                    "two": count == 2,
                    "row": (count == 3) & same_axis,
                    "corner": (count == 3) & ~same_axis,
                }[case]
            )
            index = np.flatnonzero(chosen)
            if len(index) == 0:
                continue
            h = half[index][:, :, [first_axis, across]]
            put = {"one": _one, "two": _pair, "row": _row_of_three, "corner": _corner}[case]
            xy, ok = put(rng, h, relation[index], lengths[first_axis], lengths[across])
            centres[index[:, None], np.arange(xy.shape[1])[None], first_axis] = xy[..., 0]
            centres[index[:, None], np.arange(xy.shape[1])[None], across] = xy[..., 1]
            fits[index] = ok
    return centres, fits


def _uniform(rng, half, length):
    """Anywhere inside, for things of half-extent `half`."""
    return EDGE + half + rng.random(half.shape) * (length - 2 * EDGE - 2 * half)


def _inside(value, half, length):
    return np.clip(value, EDGE + half, length - EDGE - half)


def _line_up(rng, half, length):
    """Centres of things in order along a line, (N, k), and whether they fit."""
    n, k = half.shape
    slack = length - 2 * EDGE - (k - 1) * GAP - 2 * half.sum(1)
    pieces = rng.dirichlet(np.ones(k + 1), n)[:, :k] * np.maximum(slack, 0)[:, None]
    before = np.cumsum(2 * half, 1) - half + np.arange(k) * GAP
    return EDGE + before + np.cumsum(pieces, 1), slack >= 0


def _order(rng, half, order, length):
    """As `_line_up`, with `order` (N, k) naming which thing comes first, second, ..."""
    placed, fits = _line_up(rng, np.take_along_axis(half, order, 1), length)
    centres = np.empty_like(placed)
    np.put_along_axis(centres, order, placed, 1)
    return centres, fits


def _one(rng, h, relation, length, breadth):
    h = h[:, :1]
    xy = np.stack([_uniform(rng, h[..., 0], length), _uniform(rng, h[..., 1], breadth)], -1)
    return xy, np.ones(len(h), bool)


def _pair_order(relation):
    return np.where((relation[:, :1] % 2 == 0), [[0, 1]], [[1, 0]])


def _pair(rng, h, relation, length, breadth):
    """In order along the relation's axis; across it at most 0.7 times as far apart."""
    h = h[:, :2]
    x, fits = _order(rng, h[..., 0], _pair_order(relation), length)
    y = _uniform(rng, h[..., 1], breadth)
    reach = 0.7 * np.abs(x[:, 1] - x[:, 0]) * rng.uniform(-1, 1, len(h))
    y[:, 1] = _inside(y[:, 0] + reach, h[:, 1, 1], breadth)
    return np.stack([x, y], -1), fits


def _row_of_three(rng, h, relation, length, breadth):
    """Both relations along one axis: the third thing lies beyond both others."""
    pair = _pair_order(relation)
    third = np.full((len(h), 1), 2)
    order = np.where((relation[:, 1:] % 2 == 0), np.hstack([pair, third]), np.hstack([third, pair]))
    x, fits = _order(rng, h[..., 0], order, length)
    middle = _uniform(rng, h[..., 1].max(1, keepdims=True), breadth)
    y = _inside(middle + rng.uniform(-0.2, 0.2, (len(h), 3)), h[..., 1], breadth)
    return np.stack([x, y], -1), fits


def _corner(rng, h, relation, length, breadth):
    """The second relation across the first: two things in a band, the third beyond the band."""
    x_pair, fits = _order(rng, h[:, :2, 0], _pair_order(relation), length)
    x_third = _uniform(rng, h[:, 2:, 0], length)
    band = h[:, :2, 1].max(1)
    slack = breadth - 2 * EDGE - GAP - 2 * band - 2 * h[:, 2, 1]
    fits = fits & (slack >= 0)
    band = band + 0.5 * rng.uniform(0, 0.4, len(h)) * np.maximum(slack, 0)
    order = _pair_order(relation[:, 1:])
    y_both, band_fits = _order(rng, np.stack([band, h[:, 2, 1]], 1), order, breadth)
    room = band[:, None] - h[:, :2, 1]
    y_pair = y_both[:, :1] + rng.uniform(-1, 1, room.shape) * room
    xy = np.stack([np.hstack([x_pair, x_third]), np.hstack([y_pair, y_both[:, 1:]])], -1)
    return xy, fits & band_fits
