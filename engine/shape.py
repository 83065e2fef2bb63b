"""How large a request's steps are (`StepShape`), and the name under which they are priced (`CostKey`). Values only."""

import re
import sys
from collections.abc import Sequence
from typing import Literal

import msgspec

COST_KEY = (
    r"(?P<width>[1-9][0-9]{0,5})x(?P<height>[1-9][0-9]{0,5})(x(?P<frames>[2-9]|[1-9][0-9]{1,5}))?"
    r"(\+r(?P<reference>[1-9][0-9]{0,7}))?(\+p(?P<pictures>[1-9][0-9]{0,2}))?(\*(?P<branches>[2-9]|[1-9][0-9]{1,2}))?"
)
"""The texts of cost keys, as a regular expression."""
_COST_KEY = re.compile(COST_KEY)


Rows = Literal["text", "image", "reference", "one"]
"""How many rows a tensor has: those of a segment, or one for the whole request."""
Size = tuple[int, int]
"""(width, height) in pixels."""


class CostKey(msgspec.Struct, frozen=True, kw_only=True):
    """What a request's cost depends on besides its model: `width` and `height` in pixels, `frames`, `reference` (rows
    that are attended to and not stepped), `pictures` (of the same size, that are encoded and leave no rows),
    `num_branches` (of guidance: how often a step evaluates the network).

    Its `text` names a class of a cost table: "1024x1024", "832x480x81" (frames), "1024x1024+r4096" (reference rows),
    "1024x1024+p1" (a picture), "1024x1024*2" (branches). Each key has one text and each text one key.
    """

    width: int
    height: int
    frames: int = 1
    reference: int = 0
    pictures: int = 0
    num_branches: int = 1

    @property
    def text(self) -> str:
        frames = f"x{self.frames}" if self.frames > 1 else ""
        reference = f"+r{self.reference}" if self.reference else ""
        pictures = f"+p{self.pictures}" if self.pictures else ""
        branches = f"*{self.num_branches}" if self.num_branches > 1 else ""
        return f"{self.width}x{self.height}{frames}{reference}{pictures}{branches}"

    @property
    def pixels(self) -> int:
        """Of all frames."""
        return self.width * self.height * self.frames

    @property
    def transposed(self) -> "CostKey":
        """Width and height exchanged: it costs the same."""
        return msgspec.structs.replace(self, width=self.height, height=self.width)


class StepShape(msgspec.Struct, frozen=True, kw_only=True):
    """What one denoising step of a request works on. `width` and `height` of the picture in pixels, `frames` of a
    video; `image`: rows of the segment that is stepped; `reference`: rows that are attended to only, of pictures of the
    sizes `references`; `text`: rows, one entry a guidance branch. `pictures`: how many of the request's pictures have
    its own size; with `has_mask` there is a mask of that size, too."""

    width: int
    height: int
    frames: int = 1
    image: int
    reference: int = 0
    references: tuple[Size, ...] = ()
    pictures: int = 0
    has_mask: bool = False
    text: tuple[int, ...]

    @property
    def num_branches(self) -> int:
        return len(self.text)

    def rows(self, kind: Rows, branch: int = 0) -> int:
        """Rows of a segment, or of a slot's field: `one` has one."""
        match kind:
            case "text":
                return self.text[branch]
            case "image":
                return self.image
            case "reference":
                return self.reference
            case "one":
                return 1

    def counts(self, segments: Sequence[Rows], branch: int = 0) -> tuple[int, ...]:
        """Rows of each of a family's segments, in its canonical order."""
        return tuple(self.rows(segment, branch) for segment in segments)

    @property
    def size(self) -> Size:
        """(width, height) in pixels."""
        return self.width, self.height

    @property
    def inputs(self) -> tuple[tuple[int, int, int], ...]:
        """Of the pictures that a request brings, in this order, and of its mask: height, width, channels."""
        pictures = [(height, width, 3) for width, height in (*self.references, *[self.size] * self.pictures)]
        return (*pictures, *[(self.height, self.width, 1)] * self.has_mask)

    @property
    def cost_key(self) -> str:
        """The text of its `CostKey`. Interned, since planners look it up for every request at every decision."""
        key = CostKey(
            width=self.width,
            height=self.height,
            frames=self.frames,
            reference=self.reference,
            pictures=self.pictures,
            num_branches=self.num_branches,
        )
        return sys.intern(key.text)


def parse_cost_key(text: str) -> CostKey:
    """The key with this text. Raises ValueError if there is none."""
    match = _COST_KEY.fullmatch(text)
    if match is None:
        raise ValueError(f'expected sizes like "1024x1024" or "832x480x81+r4096*2", got {text!r}')
    return CostKey(
        width=int(match["width"]),
        height=int(match["height"]),
        frames=int(match["frames"] or 1),
        reference=int(match["reference"] or 0),
        pictures=int(match["pictures"] or 0),
        num_branches=int(match["branches"] or 1),
    )


def cost_key_of_size(size: Size) -> str:
    """The key of a single picture of (width, height), drawn in one branch and without references."""
    return sys.intern(f"{size[0]}x{size[1]}")
