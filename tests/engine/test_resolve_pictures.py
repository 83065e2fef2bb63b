"""What a request may bring of pictures, by what its model does with them, and what it then looks like."""

import math

import msgspec
import numpy as np
import pytest
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.engine.specs import make_spec
from tetrion.engine.errors import RequestError
from tetrion.engine.model_spec import ModelSpec, ReferenceArea
from tetrion.engine.pictures import Picture
from tetrion.engine.request import ImageRequest, ResolvedRequest
from tetrion.engine.resolve import decoded, resolve_request

PLAIN = make_spec()
EDITOR = msgspec.structs.replace(
    PLAIN, inputs=PLAIN.inputs | {"pictures"}, max_pictures=2, reference_sizes=((128, 256), (192, 192), (256, 128))
)
WITHIN = ReferenceArea(pixels=1024**2, multiple=16, is_most=True, min_side=64, max_ratio=8)
"""FLUX.2's."""
ABOUT = ReferenceArea(pixels=1024**2, multiple=32, is_most=False, min_side=8, max_ratio=8)
"""Qwen-Image's."""
KEEPER = msgspec.structs.replace(PLAIN, inputs=PLAIN.inputs | {"pictures"}, max_pictures=3, reference_area=WITHIN)
BEGINNER = msgspec.structs.replace(PLAIN, inputs=PLAIN.inputs | {"pictures", "strength"}, max_pictures=1, strength=0.5)
FILLER = msgspec.structs.replace(PLAIN, inputs=PLAIN.inputs | {"pictures", "mask"}, max_pictures=1)


def picture(width: int, height: int) -> np.ndarray:
    return np.full((height, width, 3), 100, np.uint8)


def resolve(spec: ModelSpec, **fields: object) -> ResolvedRequest:
    return resolve_request(ImageRequest(prompt="a star", **fields), spec, 4)  # type: ignore[arg-type]


def refusal(spec: ModelSpec, field: str, **fields: object) -> str:
    with pytest.raises(RequestError) as caught:
        resolve(spec, **fields)
    assert caught.value.field == field
    return str(caught.value)


def test_a_model_that_takes_none_says_so() -> None:
    assert refusal(PLAIN, "pictures", pictures=[picture(64, 64)]) == "pictures: is no input of model 'tiny'"
    assert "is no input" in refusal(PLAIN, "mask", mask=picture(64, 64))
    assert "is no input" in refusal(PLAIN, "strength", strength=0.5)
    assert resolve(PLAIN, pictures=[]).params.shape == resolve(PLAIN).params.shape


def test_references_are_resized_to_the_known_size_nearest_in_shape() -> None:
    resolved = resolve(EDITOR, pictures=[picture(50, 100), picture(300, 310)], width=128, height=128)
    shape = resolved.params.shape
    assert shape.references == ((128, 256), (192, 192)) and shape.size == (128, 128)
    assert shape.reference == 128 * 256 // 256 + 192 * 192 // 256 and shape.pictures == 0
    assert shape.inputs == ((256, 128, 3), (192, 192, 3))
    assert [p.pixels.shape for p in resolved.asked.pictures] == [(256, 128, 3), (192, 192, 3)]
    assert shape.cost_key == "128x128+r272"


def test_references_have_a_bound() -> None:
    said = refusal(EDITOR, "pictures", pictures=[picture(64, 64)] * 3)
    assert said == "pictures: has 3 pictures, at most 2 are taken"


def test_references_of_an_area_keep_their_shapes_and_order() -> None:
    resolved = resolve(KEEPER, pictures=[picture(100, 71), picture(64, 200), picture(100, 71)])
    shape = resolved.params.shape
    assert shape.references == ((96, 64), (64, 192), (96, 64)) and shape.reference == 6 * 4 + 4 * 12 + 6 * 4
    assert shape.inputs == ((64, 96, 3), (192, 64, 3), (64, 96, 3)) and shape.cost_key.endswith("+r96")
    assert "has 4 pictures, at most 3 are taken" in refusal(KEEPER, "pictures", pictures=[picture(64, 64)] * 4)


def test_what_a_reference_has_beyond_multiples_is_cut_off_around_the_middle() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (71, 100, 3), np.uint8)
    (reference,) = resolve(KEEPER, pictures=[pixels]).asked.pictures
    assert np.array_equal(reference.pixels, pixels[3:67, 2:98])


def test_references_that_are_too_small_or_too_long_are_refused() -> None:
    said = refusal(KEEPER, "pictures", pictures=[picture(640, 640), picture(640, 63)])
    assert said == "pictures: must have sides of at least 64 pixels, got 640x63"
    said = refusal(KEEPER, "pictures", pictures=[picture(641, 80)])
    assert said == "pictures: must have sides of at most 1:8, got 641x80"
    assert resolve(KEEPER, pictures=[picture(640, 80)]).params.shape.references == ((640, 80),)


@settings(deadline=None, max_examples=100)
@given(short=st.integers(64, 4000), ratio=st.floats(1, 8), is_tall=st.booleans())
def test_references_are_as_large_as_diffusers_has_them(short: int, ratio: float, is_tall: bool) -> None:
    width, height = (int(short * ratio), short)[:: -1 if is_tall else 1]
    width, height = min(width, 8 * height), min(height, 8 * width)
    scaled = Image.new("L", (width, height))
    if width * height > 1024**2:
        scaled = Flux2ImageProcessor._resize_to_target_area(scaled)
    assert WITHIN.scaled((width, height)) == scaled.size
    assert WITHIN.size((width, height)) == (scaled.width // 16 * 16, scaled.height // 16 * 16)
    assert ABOUT.size((width, height)) == calculate_dimensions(1024**2, width / height)
    for area in (WITHIN, ABOUT):
        assert area.fault((width, height)) is None
        assert math.prod(area.size((width, height))) <= area.max_pixels < 1.06 * area.pixels


@settings(deadline=None, max_examples=50)
@given(width=st.integers(8, 900), height=st.integers(8, 900))
def test_without_a_size_the_result_has_the_picture_s_as_far_as_the_model_draws_it(width: int, height: int) -> None:
    for spec in (EDITOR, BEGINNER):
        (size,) = {resolve(spec, pictures=[picture(width, height)]).params.shape.size}
        assert all(map(spec.sizes.accept, size))
        if spec is BEGINNER and all(spec.sizes.min <= side <= spec.sizes.max for side in (width, height)):
            assert abs(size[0] - width) <= spec.sizes.multiple / 2 >= abs(size[1] - height)


def test_a_picture_that_is_begun_with_has_the_result_s_size() -> None:
    resolved = resolve(BEGINNER, pictures=[picture(300, 100)], width=256, height=128)
    shape = resolved.params.shape
    assert shape.pictures == 1 and shape.inputs == ((128, 256, 3),) and not shape.references
    assert resolved.asked.pictures[0].size == (256, 128) and shape.cost_key == "256x128+p1"


@pytest.mark.parametrize(
    ("num_steps", "strength", "skipped"),
    [(10, 1.0, 0), (10, 0.65, 3), (10, 0.1, 9), (28, 0.6, 11), (1, 1, 0), (3, 0.5, 1)],
)
def test_strength_skips_steps_as_diffusers_counts_them(num_steps: int, strength: float, skipped: int) -> None:
    resolved = resolve(BEGINNER, pictures=[picture(128, 128)], num_steps=num_steps, strength=strength)
    assert resolved.params.skipped_steps == skipped and resolved.params.num_steps == num_steps - skipped
    assert resolved.asked.num_steps == num_steps and resolved.asked.strength == strength


def test_strength_has_a_default_and_bounds() -> None:
    brought = {"pictures": [picture(128, 128)]}
    assert resolve(BEGINNER, **brought).asked.strength == 0.5
    assert "must be above 0 and at most 1, got 0" in refusal(BEGINNER, "strength", strength=0, **brought)
    assert "at most 1, got 1.5" in refusal(BEGINNER, "strength", strength=1.5, **brought)
    said = refusal(BEGINNER, "strength", strength=1e-18, num_steps=10, **brought)
    assert said == "strength: must leave at least one of 10 steps, got 1e-18"
    assert "takes a picture to go with it" in refusal(BEGINNER, "strength", strength=0.5)
    assert "is no input" in refusal(EDITOR, "strength", strength=0.5, **brought)


def test_degrees_are_forced_of_the_steps_that_are_run() -> None:
    brought = {"pictures": [picture(128, 128)], "num_steps": 10, "strength": 0.3}
    assert resolve(BEGINNER, force_degrees=(1, 2, 3), **brought).asked.force_degrees == (1, 2, 3)
    assert "more than 3 entries for 3 steps" in refusal(BEGINNER, "force_degrees", force_degrees=(1,) * 4, **brought)


def test_a_mask_has_the_result_s_size_and_needs_a_picture() -> None:
    resolved = resolve(FILLER, pictures=[picture(128, 128)], mask=picture(64, 64), width=256, height=128)
    assert resolved.asked.mask.shape == (128, 256) and resolved.params.shape.has_mask
    assert resolved.params.shape.inputs == ((128, 256, 3), (128, 256, 1))
    assert "takes a picture to go with it" in refusal(FILLER, "mask", mask=picture(64, 64))
    assert "is no input" in refusal(BEGINNER, "mask", pictures=[picture(64, 64)], mask=picture(64, 64))


def test_a_settled_request_settles_to_itself() -> None:
    """It comes from `check`, and from another thread."""
    for spec, fields in (
        (EDITOR, {"pictures": [picture(333, 100), picture(64, 99)]}),
        (KEEPER, {"pictures": [picture(2000, 1333), picture(72, 99)]}),
        (BEGINNER, {"pictures": [picture(333, 100)], "strength": 0.7}),
        (FILLER, {"pictures": [picture(333, 100)], "mask": picture(20, 20)}),
    ):
        asked = ImageRequest(prompt="a star", seed=1, request_id="r", **fields)  # type: ignore[arg-type]
        first = resolve_request(asked, spec, 4)
        for again in (first.asked, decoded(asked, spec, 4)):
            second = resolve_request(again, spec, 4)
            assert second.params == first.params
            for one, other in zip(first.asked.pictures, second.asked.pictures, strict=True):
                assert isinstance(one, Picture) and np.array_equal(one.pixels, other.pixels)


def test_slots_hold_whatever_a_request_may_bring() -> None:
    for spec, fields in (
        (EDITOR, {"pictures": [picture(128, 256)] * 2}),
        (KEEPER, {"pictures": [picture(4000, 4000)] * 3}),
        (KEEPER, {"pictures": [picture(3333, 420)] * 3}),
        (BEGINNER, {"pictures": [picture(512, 512)], "width": 512, "height": 512}),
        (FILLER, {"pictures": [picture(512, 512)], "mask": picture(64, 64), "width": 512, "height": 512}),
    ):
        shape = resolve(spec, **fields).params.shape
        assert sum(h * w * c for h, w, c in shape.inputs) <= spec.max_input_bytes
        assert shape.reference <= spec.max_rows("reference") <= spec.largest_shape.reference
