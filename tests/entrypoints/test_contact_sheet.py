"""The sheet holds every picture whole and captions that fit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageFont

from tetrion.entrypoints import contact_sheet
from tetrion.entrypoints.contact_sheet import Thumbnail, thumbnail, wrap
from tetrion.entrypoints.contact_sheet import contact_sheet as make_sheet


def flat(
    width: int, height: int, colour: tuple[int, int, int], prompt: str = "a red circle", seed: int = 7
) -> Thumbnail:
    return thumbnail(np.full((height, width, 3), colour, np.uint8), prompt, seed, 200)


def count(sheet: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((sheet == np.array(colour, np.uint8)).all(axis=2).sum())


def test_every_picture_is_on_the_sheet_whole() -> None:
    colours = [(200, 10 * i, 30) for i in range(5)]
    sheet = make_sheet([flat(128, 128, colour) for colour in colours], 200)
    assert [count(sheet, colour) for colour in colours] == [128 * 128] * 5


def test_large_pictures_are_scaled_down_and_small_ones_are_not_scaled_up() -> None:
    assert flat(512, 256, (1, 2, 3)).picture.size == (200, 100)
    assert flat(128, 64, (1, 2, 3)).picture.size == (128, 64)


def test_captions_are_drawn_below_the_picture() -> None:
    plain = make_sheet([flat(128, 128, (9, 9, 9), prompt=" ", seed=1)], 200)
    with_prompt = make_sheet([flat(128, 128, (9, 9, 9), prompt="a red circle", seed=1)], 200)
    dark = [int((sheet[220:] < 120).all(axis=2).sum()) for sheet in (plain, with_prompt)]
    assert 0 < dark[0] < dark[1]


@pytest.mark.parametrize("prompt", ["красный круг", "赤い円 🔴", "x" * 5000, "two\nlines\tand a tab"])
def test_any_prompt_can_be_a_caption(prompt: str) -> None:
    sheet = make_sheet([flat(128, 128, (9, 9, 9), prompt=prompt)] * 2, 200)
    assert sheet.dtype == np.uint8 and sheet.shape[1] == contact_sheet.GAP_PX + 2 * (200 + contact_sheet.GAP_PX)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="ascii", exclude_categories=["C"]), max_size=200), st.integers(60, 300))
def test_wrapped_lines_fit_and_lose_nothing_but_the_end(text: str, width_px: int) -> None:
    font = ImageFont.load_default(size=contact_sheet.FONT_PX)
    lines = wrap(text, font, width_px, 4)
    assert len(lines) <= 4
    assert all(font.getlength(line) <= width_px for line in lines)
    joined, whole = "".join("".join(lines).split()), "".join(text.split())
    assert joined == whole or (joined.endswith("…") and whole.startswith(joined[:-1]))


def test_cells_shrink_with_the_number_of_pictures() -> None:
    assert contact_sheet.cell_px(2, 1024) == contact_sheet.MAX_CELL_PX
    assert contact_sheet.cell_px(2, 256) == 256
    assert contact_sheet.cell_px(10_000, 1024) == contact_sheet.cell_px(1, 64) == contact_sheet.MIN_CELL_PX


def test_an_empty_sheet_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        make_sheet([], 200)
