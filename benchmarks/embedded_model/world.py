"""The world that the embedded model draws: colours, shapes, sizes, relations, scenes, and what is held out.

Owns the vocabulary of meaning only; wording is in `captions.py`, placing in `scenes.py`, drawing in `renderer.py`.
"""

import zlib
from dataclasses import dataclass

COLOURS = {
    "red": "#E53935",
    "orange": "#FB8C00",
    "yellow": "#FDD835",
    "green": "#43A047",
    "cyan": "#00BCD4",
    "blue": "#1E5BD6",
    "purple": "#8E24AA",
    "pink": "#F06292",
    "brown": "#795548",
    "white": "#FFFFFF",
}
BACKGROUNDS = {
    "black": "#000000",
    "white": "#FFFFFF",
    "gray": "#9E9E9E",
    "navy": "#0D1B4C",
    "beige": "#F5E6C8",
    "mint": "#B8F2D0",
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
SIZES = {"small": 0.18, "medium": 0.30, "large": 0.45}  # longer side of the bounding box / picture's shorter side
RELATIONS = ("left", "right", "above", "below")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
HELD_OUT_SHARE = 12  # in percent


def rgb(hex_colour: str) -> tuple[int, int, int]:
    """`#RRGGBB` as three integers 0..255."""
    return int(hex_colour[1:3], 16), int(hex_colour[3:5], 16), int(hex_colour[5:7], 16)


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    colour: str
    shape: str
    size: str = "medium"


@dataclass(frozen=True)
class Scene:
    """One to three things, the relations that tie them, and a background.

    `relations[i]` places thing i relative to thing i + 1, and the second relation places *both* first things relative
    to the third ("A left of B above C": A and B are above C). None leaves the placing free.
    """

    things: tuple[Thing, ...]
    relations: tuple[str | None, ...] = ()
    background: str = "white"

    @property
    def is_visible(self) -> bool:
        return all(thing.colour != self.background for thing in self.things)


def _percentile(text: str) -> int:
    return zlib.crc32(text.encode()) % 100


def is_held_out_thing(thing: Thing) -> bool:
    """Whether this (colour, shape, size) never appears in training; stable across machines and versions."""
    return _percentile(f"{thing.colour}/{thing.shape}/{thing.size}") < HELD_OUT_SHARE


def is_held_out_pair(first: Thing, second: Thing) -> bool:
    """Whether these two (colour, shape) never appear together in a training picture, in either order."""
    names = sorted((f"{first.colour}/{first.shape}", f"{second.colour}/{second.shape}"))
    return _percentile("|".join(names)) < HELD_OUT_SHARE


def is_held_out(scene: Scene) -> bool:
    """Whether a scene holds any combination that is kept from training."""
    things = scene.things
    pairs = [(a, b) for i, a in enumerate(things) for b in things[i + 1 :]]
    return any(map(is_held_out_thing, things)) or any(is_held_out_pair(a, b) for a, b in pairs)
