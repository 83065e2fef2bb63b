"""Looks at a picture and says what is drawn: an independent judge that shares no code with the renderer.

Segments against the background colour, finds connected components, and for each measures colour (median of its inside),
bounding box (at half coverage) and shape (overlap with templates drawn by PIL). Then compares with the scene asked for.
"""

import functools
from dataclasses import dataclass, field
from itertools import permutations

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from benchmarks.embedded_model.world import BACKGROUNDS, COLOURS, SIZES, Scene, rgb

SIZE_TOLERANCE = 0.15
COLOUR_TOLERANCE = 45.0  # Euclidean distance in 0..255 RGB to the palette's colour
TEMPLATE_PIXELS = 96
LEAST_OVERLAP = 0.75  # intersection over union with the best template
_PALETTE = {name: np.array(rgb(value), float) for name, value in COLOURS.items()}
_BACKGROUNDS = {name: np.array(rgb(value), float) for name, value in BACKGROUNDS.items()}


@dataclass
class Seen:
    """One thing found: names, the bounding box in pixels (left, top, right, bottom) and the centroid (x, y)."""

    colour: str
    shape: str
    box: tuple[float, float, float, float]
    centroid: tuple[float, float]

    @property
    def side(self) -> float:
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])


@dataclass
class Verdict:
    """Which requirements a picture meets; `is_right` when all of them."""

    background: bool = False
    count: bool = False
    colour: bool = False
    shape: bool = False
    size: bool = False
    relation: bool = False
    seen: list[Seen] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        return self.background and self.count and self.colour and self.shape and self.size and self.relation


def check(picture: np.ndarray, scene: Scene) -> Verdict:
    """Judge an RGB picture (height, width, 3), uint8, against a scene."""
    background, things = look(picture)
    verdict = Verdict(background=background == scene.background, count=len(things) == len(scene.things), seen=things)
    if not verdict.count:
        return verdict
    shorter = min(picture.shape[:2])
    best = max(
        (_compare([things[i] for i in order], scene, shorter) for order in permutations(range(len(things)))),
        key=lambda marks: (all(marks), sum(marks)),
    )
    verdict.colour, verdict.shape, verdict.size, verdict.relation = best
    return verdict


def look(picture: np.ndarray) -> tuple[str | None, list[Seen | None]]:
    """The background's name (None if it is no known colour) and what stands on it (None: something unrecognisable)."""
    pixels = picture.astype(float)
    ground, name = _ground(pixels)
    foreground = np.linalg.norm(pixels - ground, axis=-1) > 26
    labels, num = ndimage.label(foreground, np.ones((3, 3)))
    least_area = max(6.0, 0.0015 * min(picture.shape[:2]) ** 2)
    areas = ndimage.sum_labels(foreground, labels, range(1, num + 1))
    return name, [_identify(pixels, labels == i + 1, ground) for i in range(num) if areas[i] >= least_area]


def _ground(pixels: np.ndarray) -> tuple[np.ndarray, str | None]:
    """The commonest colour along the border, and the named background it is nearest to."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    name = min(_BACKGROUNDS, key=lambda key: float(np.linalg.norm(ground - _BACKGROUNDS[key])))
    return ground, name if np.linalg.norm(ground - _BACKGROUNDS[name]) <= 25 else None


def _identify(pixels: np.ndarray, mask: np.ndarray, ground: np.ndarray) -> Seen | None:
    inside = ndimage.binary_erosion(mask, np.ones((3, 3)))
    inside = inside if inside.sum() >= 8 else mask
    colour = np.median(pixels[inside], axis=0)
    name = min(_PALETTE, key=lambda key: float(np.linalg.norm(colour - _PALETTE[key])))
    is_even = np.mean(np.linalg.norm(pixels[inside] - colour, axis=-1) < 60) >= 0.85
    if np.linalg.norm(colour - _PALETTE[name]) > COLOUR_TOLERANCE or not is_even:
        return None
    direction = colour - ground
    near = ndimage.binary_dilation(mask, np.ones((3, 3)), iterations=2)
    coverage = np.clip(((pixels - ground) @ direction) / (direction @ direction), 0, 1) * near
    shape, box = _classify(coverage)
    if shape is None:
        return None
    y, x = ndimage.center_of_mass(coverage)
    return Seen(name, shape, box, (x + 0.5, y + 0.5))


def _classify(coverage: np.ndarray) -> tuple[str | None, tuple[float, float, float, float]]:
    """The best template's name and the bounding box at half coverage; None where nothing overlaps well."""
    solid = coverage >= 0.5
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    if len(rows) == 0:
        return None, (0.0, 0.0, 0.0, 0.0)
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    side = max(box[2] - box[0], box[3] - box[1])
    left, top = (box[0] + box[2] - side) / 2, (box[1] + box[3] - side) / 2
    image = Image.fromarray((coverage * 255).astype(np.uint8))
    window = image.transform(
        (TEMPLATE_PIXELS, TEMPLATE_PIXELS),
        Image.Transform.EXTENT,
        (left, top, left + side, top + side),
        Image.Resampling.BILINEAR,
    )
    drawn = np.asarray(window) >= 128
    overlaps = {name: (drawn & template).sum() / (drawn | template).sum() for name, template in _templates().items()}
    best = max(overlaps, key=lambda name: float(overlaps[name]))
    return (best if overlaps[best] >= LEAST_OVERLAP else None), box


@functools.cache
def _templates() -> dict[str, np.ndarray]:
    """Boolean masks of every shape, centred, the longer side of its bounding box filling the square."""
    n = 8 * TEMPLATE_PIXELS
    templates = {}
    for name, outlines in _outlines().items():
        image = Image.new("L", (n, n), 0)
        pen = ImageDraw.Draw(image)
        for kind, points, ink in outlines:
            getattr(pen, kind)([(0.5 + value) * n for value in points], fill=ink)
        templates[name] = np.asarray(image.resize((TEMPLATE_PIXELS, TEMPLATE_PIXELS), Image.Resampling.BOX)) >= 128
    return templates


def _outlines() -> dict[str, list[tuple[str, list[float], int]]]:
    """PIL drawing calls (kind, flat coordinates in -0.5..0.5, ink) that make each shape."""
    angles = np.deg2rad(-90 + 36 * np.arange(10))
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    tips = np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)
    low, high = tips.min(0), tips.max(0)
    star = (tips - (low + high) / 2) / (high - low).max()
    radius = 0.5 / (1 + np.sqrt(0.5))  # heart: half discs on the upper edges of a square standing on its corner
    unit = radius * np.sqrt(2)  # half the square's diagonal
    corner_y = (1.5 * unit + radius) / 2
    heart = [-unit, corner_y - unit, 0, corner_y - 2 * unit, unit, corner_y - unit, 0, corner_y]
    discs = []
    for centre_x in (-unit / 2, unit / 2):
        centre_y = corner_y - 1.5 * unit
        discs.append([centre_x - radius, centre_y - radius, centre_x + radius, centre_y + radius])
    third = 1 / 6
    return {
        "circle": [("ellipse", [-0.5, -0.5, 0.5, 0.5], 255)],
        "ring": [("ellipse", [-0.5, -0.5, 0.5, 0.5], 255), ("ellipse", [-0.25, -0.25, 0.25, 0.25], 0)],
        "square": [("rectangle", [-0.5, -0.5, 0.5, 0.5], 255)],
        "diamond": [("polygon", [0, -0.5, 0.5, 0, 0, 0.5, -0.5, 0], 255)],
        "triangle": [("polygon", [0, -0.433, 0.5, 0.433, -0.5, 0.433], 255)],
        "cross": [
            ("rectangle", [-0.5, -third, 0.5, third], 255),
            ("rectangle", [-third, -0.5, third, 0.5], 255),
        ],
        "star": [("polygon", [float(v) for v in star.ravel()], 255)],
        "heart": [("polygon", heart, 255), *(("ellipse", disc, 255) for disc in discs)],
    }


def _compare(things: list[Seen | None], scene: Scene, shorter: int) -> tuple[bool, bool, bool, bool]:
    """Whether colours, shapes, sizes and relations are those of the scene, thing by thing."""
    pairs = list(zip(things, scene.things, strict=True))
    colour = all(seen is not None and seen.colour == asked.colour for seen, asked in pairs)
    shape = all(seen is not None and seen.shape == asked.shape for seen, asked in pairs)
    size = all(
        seen is not None and abs(seen.side / (SIZES[asked.size] * shorter) - 1) <= SIZE_TOLERANCE
        for seen, asked in pairs
    )
    relation = all(_holds(word, things[i], things[i + 1], shorter) for i, word in enumerate(scene.relations))
    return colour, shape, size, relation


def _holds(relation: str | None, first: Seen | None, second: Seen | None, shorter: int) -> bool:
    """By centroids, at least a twentieth of the shorter side apart, with bounding boxes apart along the axis."""
    if relation is None:
        return True
    if first is None or second is None:
        return False
    axis = 0 if relation in ("left", "right") else 1
    if relation in ("right", "below"):
        first, second = second, first
    is_apart = first.box[axis + 2] <= second.box[axis] + 0.02 * shorter
    return second.centroid[axis] - first.centroid[axis] >= 0.05 * shorter and is_apart
