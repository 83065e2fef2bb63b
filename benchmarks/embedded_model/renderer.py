"""Draws scenes as anti-aliased pictures with signed distance functions, in batches, on any torch device.

Outlines after Inigo Quilez, "2D distance functions". A shape of size s has a bounding box whose longer side is s times
the picture's shorter side; inexact distances far from the outline do not matter, only the sign and the last pixel.
"""

import math

import numpy as np
import torch

from benchmarks.embedded_model.scenes import SIZE_VALUES, SceneArrays
from benchmarks.embedded_model.world import BACKGROUNDS, COLOURS, SHAPES, rgb

PALETTE = torch.tensor([rgb(c) for c in COLOURS.values()], dtype=torch.float32) / 127.5 - 1
BACKGROUND_PALETTE = torch.tensor([rgb(c) for c in BACKGROUNDS.values()], dtype=torch.float32) / 127.5 - 1


def draw(scenes: SceneArrays, centres: np.ndarray, width: int, height: int, device="cpu") -> torch.Tensor:
    """Pictures (N, 3, height, width) in -1..1; `centres` (N, 3, 2) in units of the shorter side."""
    side = min(width, height)
    y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5)[:, None] / side
    x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5)[None, :] / side
    ground = BACKGROUND_PALETTE[scenes.background].to(device)
    picture = ground[:, :, None, None].repeat(1, 1, height, width)
    for k in range(scenes.shape.shape[1]):
        for i, outline in enumerate(OUTLINES):
            chosen = np.flatnonzero(scenes.shape[:, k] == i)
            if len(chosen) == 0:
                continue
            size = SIZE_VALUES[scenes.size[chosen, k]][:, None]
            numbers = torch.as_tensor(np.hstack([size, centres[chosen, k]]), dtype=torch.float32).to(device)
            s, centre_x, centre_y = numbers[:, :, None, None].unbind(1)
            distance = outline((x - centre_x) / s, (y - centre_y) / s)
            coverage = (0.5 - distance * s * side).clamp(0, 1)[:, None]
            colour = PALETTE[scenes.colour[chosen, k]].to(device)[:, :, None, None]
            index = torch.as_tensor(chosen, device=device)
            picture[index] = torch.lerp(picture[index], colour, coverage)
    return picture


def _circle(x, y):
    return torch.hypot(x, y) - 0.5


def _square(x, y):
    return torch.maximum(x.abs(), y.abs()) - 0.5


def _triangle(x, y):
    """Equilateral, apex up."""
    height = math.sqrt(3) / 2
    slope = x.abs() * height - (y + height / 2) * 0.5
    return torch.maximum(slope, y - height / 2)


def _star(x, y):
    """Five points, apex up, inner radius 0.42 of the outer."""
    outer = 0.5 / math.sin(math.radians(72))
    y = y - outer * (1 - math.cos(math.radians(36))) / 2
    fifth = math.radians(72)
    angle = torch.atan2(x, -y)
    angle = (angle - fifth * torch.round(angle / fifth)).abs()
    radius = torch.hypot(x, y)
    px, py = radius * torch.sin(angle), radius * torch.cos(angle)
    inner_x = 0.42 * outer * math.sin(fifth / 2)
    inner_y = 0.42 * outer * math.cos(fifth / 2)
    edge = math.hypot(inner_x, inner_y - outer)
    return (px * (outer - inner_y) + (py - outer) * inner_x) / edge


def _heart(x, y):
    """A square on its corner with a half disc on each upper edge."""
    side = 1 / (1 + math.sqrt(0.5))
    height = side * (1.5 * math.sqrt(0.5) + 0.5)
    up = height / 2 - y
    square = (x.abs() + (up - side * math.sqrt(0.5)).abs() - side * math.sqrt(0.5)) * math.sqrt(0.5)
    disc = torch.hypot(x.abs() - side * math.sqrt(0.125), up - 1.5 * side * math.sqrt(0.5)) - side / 2
    return torch.minimum(square, disc)


def _diamond(x, y):
    return (x.abs() + y.abs() - 0.5) * math.sqrt(0.5)


def _cross(x, y):
    bar = torch.maximum(x.abs() - 0.5, y.abs() - 1 / 6)
    return torch.minimum(bar, torch.maximum(x.abs() - 1 / 6, y.abs() - 0.5))


def _ring(x, y):
    """The hole's diameter is half the ring's."""
    return (torch.hypot(x, y) - 0.375).abs() - 0.125


OUTLINES = (_circle, _square, _triangle, _star, _heart, _diamond, _cross, _ring)
assert [f"_{shape}" for shape in SHAPES] == [outline.__name__ for outline in OUTLINES]
