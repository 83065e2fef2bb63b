"""A font for a caption, and the caption as that font can draw it: nothing becomes an empty box.

Pillow's own font has ASCII's letters only. For others a font of the system is asked for; what that has not either is
spelled out: symbols by their names, `[large red square]`, letters and what cannot be seen by their numbers, `\\u7ea2`.
"""

import contextlib
import functools
import subprocess
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
ASK_TIMEOUT_S = 5.0
MAX_ASKED, MAX_CHARACTERS = 16, 200
"""How often the system is asked for one sheet, and for how many characters at once: those of a prompt are of a script
or two."""
KNOWN = (
    "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/noto-cjk/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf",
    "/System/Library/Fonts/Supplemental/Arial Unicode.ttf",
)
"""Where fonts of many letters lie that a system without fontconfig may have."""
NO_CHARACTER = "\U0010ffff"
JOINERS = "\u200c\u200d\ufe0e\ufe0f"
"""They shape the letters beside them, and are left out where a font does not know them."""


class CaptionFonts:
    """Those of one sheet, of `size_px`: what was found for one caption is there for the next."""

    def __init__(self, size_px: int) -> None:
        self._size_px, self._own = size_px, ImageFont.load_default(size=size_px)
        self._found: dict[tuple[str, int], ImageFont.FreeTypeFont] = {}
        self._asked_for: set[str] = set()
        self._num_asked = 0

    def caption(self, text: str) -> tuple[str, Font]:
        """`text` on one line, as it is to be drawn, and the font to draw it with: the one that has most of it."""
        text = " ".join(text.split())
        own = self._own
        if not isinstance(own, ImageFont.FreeTypeFont):  # Pillow without FreeType: ASCII in one size
            return "".join(c if c.isascii() and c.isprintable() else _spelled(c) for c in text), own
        best = self._best(own, text)
        missing = {c for c in text if not _has(best, c) and c.isprintable() and c not in JOINERS}
        if (new := missing - self._asked_for) and self._num_asked < MAX_ASKED:
            self._ask("".join(sorted(new))[:MAX_CHARACTERS])
            best = self._best(own, text)
        return "".join(c if _has(best, c) else _spelled(c) for c in text), best

    def _best(self, own: ImageFont.FreeTypeFont, text: str) -> ImageFont.FreeTypeFont:
        return max((own, *self._found.values()), key=lambda font: sum(_has(font, c) for c in text))

    def _ask(self, characters: str) -> None:
        """Look for fonts that have these characters."""
        self._asked_for.update(characters)
        self._num_asked += 1
        for path, index in (*_asked(characters), *((path, 0) for path in KNOWN if Path(path).is_file())):
            if (path, index) not in self._found:
                with contextlib.suppress(OSError, ValueError):  # a damaged one, or of bitmaps in other sizes
                    self._found[path, index] = ImageFont.truetype(path, self._size_px, index)


def _has(font: ImageFont.FreeTypeFont, character: str) -> bool:
    """Whether the font draws it, and as itself."""
    if character == " ":
        return True
    return character.isprintable() and _glyph(font, character) != _glyph(font, NO_CHARACTER)


@functools.lru_cache(4096)
def _glyph(font: ImageFont.FreeTypeFont, character: str) -> tuple[tuple[int, int], bytes]:
    mask = _unshaped(font).getmask(character)
    return mask.size, bytes(mask)


@functools.lru_cache(64)
def _unshaped(font: ImageFont.FreeTypeFont) -> ImageFont.FreeTypeFont:
    """It draws a mark alone, not on the letter that would be below it."""
    return font.font_variant(layout_engine=ImageFont.Layout.BASIC)


def _spelled(character: str) -> str:
    if character in JOINERS:
        return ""
    name = unicodedata.name(character, "")
    if name and unicodedata.category(character) in ("So", "Sk"):
        return f"[{name.lower()}]"
    return ascii(character)[1:-1]


def _asked(characters: str) -> Iterable[tuple[str, int]]:
    """What fontconfig would draw them with."""
    charset = " ".join(f"{ord(character):x}" for character in characters)
    pattern = f"sans-serif:charset={charset}:scalable=true:color=false"
    command = ["fc-match", "-f", "%{file}\\n%{index}", pattern]
    try:
        done = subprocess.run(command, capture_output=True, timeout=ASK_TIMEOUT_S, check=True)
        path, index = done.stdout.decode().splitlines()
        return [(path, int(index) & 0xFFFF)]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
