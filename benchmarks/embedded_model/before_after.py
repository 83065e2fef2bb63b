"""A sheet of edits: what was there, the instruction, what came of it, on a line each."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE_PX, TEXT_PX, GAP_PX = 128, 34, 8
PAGE, INK, RIGHT, WRONG = "#FFFFFF", "#202020", "#43A047", "#E53935"


class Edited(Protocol):
    """Both pictures (height, width, 3), uint8, and the instruction."""

    @property
    def before(self) -> np.ndarray: ...

    @property
    def text(self) -> str: ...

    @property
    def after(self) -> np.ndarray: ...


def before_after_sheet(drawn: Sequence[Edited], are_right: Sequence[bool] = (), columns: int = 4) -> Image.Image:
    """Pairs of pictures with the instruction below, and a bar that says which `are_right`, if that is known."""
    cell = (2 * SIDE_PX + 3 * GAP_PX, SIDE_PX + TEXT_PX + 2 * GAP_PX)
    rows = -(-len(drawn) // columns)
    sheet = Image.new("RGB", (columns * cell[0], rows * cell[1]), PAGE)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for i, one in enumerate(drawn):
        x, y = i % columns * cell[0] + GAP_PX, i // columns * cell[1] + GAP_PX
        for k, picture in enumerate((one.before, one.after)):
            tile = Image.fromarray(picture)
            tile.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
            left = x + k * (SIDE_PX + GAP_PX)
            sheet.paste(tile, (left, y))
            pen.rectangle((left - 1, y - 1, left + tile.width, y + tile.height), outline="#C8C8C8")
        if are_right:
            bar = (x, y + SIDE_PX + 2, x + 2 * SIDE_PX + GAP_PX, y + SIDE_PX + 4)
            pen.rectangle(bar, fill=RIGHT if are_right[i] else WRONG)
        for line, text in enumerate(_lines(one.text, 2 * SIDE_PX + GAP_PX, font)):
            pen.text((x, y + SIDE_PX + 6 + 14 * line), text, fill=INK, font=font)
    return sheet


def _lines(text: str, width_px: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """At most two."""
    words, lines = text.split(), [""]
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width_px:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines[:2]
