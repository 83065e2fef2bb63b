"""The checker says yes to rendered truth and no to pictures of something else."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.embedded_model.checker import check
from benchmarks.embedded_model.renderer import draw
from benchmarks.embedded_model.scenes import SceneArrays, from_scenes, place, sample_scenes
from benchmarks.embedded_model.world import OPPOSITE, Scene, Thing

WIDTH, HEIGHT = 160, 128


def pictures_of(scenes: SceneArrays, width: int = WIDTH, height: int = HEIGHT, seed: int = 0):
    """Those of the scenes that fit, with their pictures (N, height, width, 3) in uint8."""
    shorter = min(width, height)
    centres, fits = place(np.random.default_rng(seed), scenes, width / shorter, height / shorter)
    drawn = draw(scenes[fits], centres[fits], width, height)
    pictures = ((drawn + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [scenes[fits].scene(i) for i in range(len(pictures))], pictures


@pytest.fixture(scope="module")
def truth():
    return pictures_of(sample_scenes(np.random.default_rng(5), 100))


def test_rendered_truth_is_right(truth):
    wrong = [(scene, verdict) for scene, p in zip(*truth, strict=True) if not (verdict := check(p, scene)).is_right]
    assert not wrong


def test_pictures_of_other_scenes_are_wrong(truth):
    scenes, pictures = truth
    shifted = [*scenes[1:], scenes[0]]
    assert not any(
        check(p, other).is_right for p, other, own in zip(pictures, shifted, scenes, strict=True) if other != own
    )


@pytest.mark.parametrize("change", ["colour", "shape", "size", "relation", "background", "count"])
def test_one_wrong_property_is_seen(change):
    asked = Scene((Thing("red", "circle", "small"), Thing("blue", "star")), ("left",), "mint")
    first = asked.things[0]
    drawn = {
        "colour": replace(asked, things=(replace(first, colour="orange"), asked.things[1])),
        "shape": replace(asked, things=(replace(first, shape="ring"), asked.things[1])),
        "size": replace(asked, things=(replace(first, size="medium"), asked.things[1])),
        "relation": replace(asked, relations=(OPPOSITE["left"],)),
        "background": replace(asked, background="white"),
        "count": replace(asked, things=(*asked.things, first), relations=("left", None)),
    }[change]
    (scene,), pictures = pictures_of(from_scenes([drawn]), 192, 192)
    assert check(pictures[0], scene).is_right
    verdict = check(pictures[0], asked)
    assert not getattr(verdict, change)
    assert not verdict.is_right


def test_noise_and_flat_pictures_are_wrong():
    asked = Scene((Thing("red", "circle"),))
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert not check(noise, asked).is_right
    assert not check(np.full((128, 128, 3), 255, np.uint8), asked).is_right
