"""A contact sheet: many pictures on one page, each with its prompt and seed below.

Knows pictures as arrays and captions as text; nothing of engines or files.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tetrion.entrypoints.caption_fonts import CaptionFonts, Font

PAGE = "#FFFFFF"
FRAME = "#C8C8C8"
INK = "#202020"
FAINT_INK = "#6A6A6A"
FONT_PX = 15
LINE_PX = 19
GAP_PX = 16
MIN_CELL_PX = 160
MAX_CELL_PX = 320
MAX_SHEET_PX = 4096
MAX_PROMPT_LINES = 4
MAX_PROMPT_CHARS = 2000
"""More than four lines hold."""


class Thumbnail(msgspec.Struct, frozen=True):
    """A picture made small enough for a sheet."""

    picture: Image.Image
    prompt: str
    seed: int


class _Caption(NamedTuple):
    lines: list[str]
    font: Font


def cell_px(num_pictures: int, longest_side_px: int) -> int:
    """Side of the square that each picture fits into, so that a sheet of this many stays a reasonable file.

    No wider than the longest side of any picture, unless captions need it.
    """
    return max(MIN_CELL_PX, min(MAX_CELL_PX, longest_side_px, MAX_SHEET_PX // num_columns(num_pictures) - GAP_PX))


def num_columns(num_pictures: int) -> int:
    return math.ceil(math.sqrt(num_pictures))


def thumbnail(image: np.ndarray, prompt: str, seed: int, cell: int) -> Thumbnail:
    """`image` (uint8 RGB [H, W, 3]) scaled down to fit `cell` × `cell` pixels; never scaled up."""
    picture = Image.fromarray(image)
    picture.thumbnail((cell, cell), Image.Resampling.LANCZOS)
    return Thumbnail(picture, prompt, seed)


def contact_sheet(thumbnails: Sequence[Thumbnail], cell: int) -> np.ndarray:
    """All `thumbnails` in reading order as one picture, uint8 RGB [H, W, 3]."""
    if not thumbnails:
        raise ValueError("a contact sheet needs at least one picture")
    fonts = CaptionFonts(FONT_PX)
    captions = [_caption(fonts, item.prompt, cell) for item in thumbnails]
    columns = num_columns(len(thumbnails))
    rows = [range(start, min(start + columns, len(thumbnails))) for start in range(0, len(thumbnails), columns)]
    caption_heights = [LINE_PX * (max(len(captions[i].lines) for i in row) + 1) for row in rows]
    height = GAP_PX + sum(cell + 6 + caption + GAP_PX for caption in caption_heights)
    sheet = Image.new("RGB", (GAP_PX + columns * (cell + GAP_PX), height), PAGE)
    pen, top = ImageDraw.Draw(sheet), GAP_PX
    for row, caption_height in zip(rows, caption_heights, strict=True):
        for column, i in enumerate(row):
            left = GAP_PX + column * (cell + GAP_PX)
            _draw_cell(sheet, pen, (left, top), cell, thumbnails[i], captions[i])
        top += cell + 6 + caption_height + GAP_PX
    return np.asarray(sheet)


def _draw_cell(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    cell: int,
    item: Thumbnail,
    caption: _Caption,
) -> None:
    (left, top), (width, height) = corner, item.picture.size
    x, y = left + (cell - width) // 2, top + (cell - height) // 2
    sheet.paste(item.picture, (x, y))
    pen.rectangle((x - 1, y - 1, x + width, y + height), outline=FRAME)
    y = top + cell + 6
    for line in caption.lines:
        pen.text((left, y), line, fill=INK, font=caption.font)
        y += LINE_PX
    pen.text((left, y), f"seed {item.seed}", fill=FAINT_INK, font=ImageFont.load_default(size=FONT_PX))


def _caption(fonts: CaptionFonts, prompt: str, width_px: int) -> _Caption:
    text, font = fonts.caption(prompt[:MAX_PROMPT_CHARS])
    return _Caption(wrap(text, font, width_px, MAX_PROMPT_LINES), font)


def wrap(text: str, font: Font, width_px: int, max_lines: int) -> list[str]:
    """`text` broken into at most `max_lines` lines of at most `width_px`; what does not fit ends in `…`."""
    lines: list[str] = []
    rest = " ".join(text.split())
    while rest and len(lines) < max_lines:
        line = _longest_fit(rest, font, width_px)
        lines.append(line)
        rest = rest[len(line) :].lstrip()
    if rest:
        lines[-1] = _longest_fit(lines[-1], font, width_px - round(font.getlength("…"))) + "…"
    return lines


def _longest_fit(text: str, font: Font, width_px: int) -> str:
    """The longest beginning of `text` that is at most `width_px` wide, cut after a word if there is one."""
    if font.getlength(text) <= width_px:
        return text
    low, high = 1, len(text)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width_px else (low, middle)
    fitting = text[:low]
    if text[low] == " ":
        return fitting
    return fitting.rpartition(" ")[0] or fitting
