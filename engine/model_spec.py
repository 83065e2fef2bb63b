"""What the engine and its workers must know of a model, whatever its family (`ModelSpec`). Values only.

`families/` reads them from checkpoint folders.
"""

import functools
import math
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from tetrion.engine.errors import one_line
from tetrion.engine.shape import Rows, Size, StepShape

MAX_UNEVENNESS = 1.2
"""24 heads on 7 devices are 4 on the fullest, as many as on 6: attention has 28 places for 24 heads and gains nothing,
but the rest of a step does, so it may pay. A looser bound would add degrees like 10 and 11 (30 and 33 places, 3 heads
on the fullest as on 8) that are worth no measurement; a tighter one would leave one of seven devices idle."""


class CheckpointError(ValueError):
    """A checkpoint folder is missing, incomplete, damaged or of an architecture that is not supported. The message is
    one line, whatever the checkpoint has brought into it."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ModelTooLarge(CheckpointError):
    """The models do not fit into a device's memory; the message has the numbers."""


class SchedulerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a FlowMatchEulerDiscreteScheduler config that decides the noise levels. `use_flow_sigmas`: they are
    spaced as it was trained, whatever the pipeline would choose. `shift_terminal`: shifted levels are stretched so that
    the last step's is this; 0: they are not."""

    num_train_timesteps: Annotated[int, Meta(ge=1, le=1_000_000)] = 1000
    shift: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    use_dynamic_shifting: bool = False
    base_shift: Annotated[float, Meta(ge=-1e6, le=1e6)] = 0.5
    max_shift: Annotated[float, Meta(ge=-1e6, le=1e6)] = 1.15
    base_image_seq_len: Annotated[int, Meta(ge=0, le=1_000_000_000)] = 256
    max_image_seq_len: Annotated[int, Meta(ge=0, le=1_000_000_000)] = 4096
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    use_flow_sigmas: bool = False
    shift_terminal: Annotated[float, Meta(ge=0, lt=1)] = 0.0


class SlotField(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor of a request's state, [rows, width]. `fp32`: whatever the weights' type; `per_branch`: one for each
    guidance branch; `changes`: from step to step."""

    name: str
    rows: Rows
    width: int
    fp32: bool = False
    per_branch: bool = False
    changes: bool = False


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """Which pictures a model draws, in pixels: both sides from `min` to `max` and multiples of `multiple`. `default`:
    (width, height). One row of the image segment covers `multiple` × `multiple` pixels; rows are filled up to a
    multiple of `row_multiple` with some that cover nothing."""

    min: int
    max: int
    multiple: int
    default: Size
    row_multiple: int = 1

    def accept(self, pixels: int) -> bool:
        """Whether the model draws pictures of this width or height."""
        return pixels % self.multiple == 0 and self.min <= pixels <= self.max

    def num_rows(self, width: int, height: int) -> int:
        """Rows of the image segment of one picture, those that cover nothing included."""
        return -(-self.num_covered(width, height) // self.row_multiple) * self.row_multiple

    def num_covered(self, width: int, height: int) -> int:
        """Rows that cover pixels; they come first."""
        return (width // self.multiple) * (height // self.multiple)

    def fitted(self, size: Size) -> Size:
        """The size nearest to a picture's that is drawn: as large, if that is within the bounds, else in its shape as
        far as they allow."""
        factor = min(1.0, self.max / max(size)) if max(size) > self.max else max(1.0, self.min / min(size))
        width, height = (self._nearest(side * factor) for side in size)
        return width, height

    def _nearest(self, pixels: float) -> int:
        lowest, highest = -(-self.min // self.multiple), self.max // self.multiple
        return min(max(round(pixels / self.multiple), lowest), highest) * self.multiple


class ReferenceArea(msgspec.Struct, frozen=True, kw_only=True):
    """How large references are that keep their shape, whatever it is: of about `pixels`, sides multiples of `multiple`.

    `is_most`: smaller ones stay as they are, and what a side has beyond a multiple is cut off around the middle (as
    FLUX.2 has it); else all are resized, to the nearest multiples (Qwen-Image). Refused: sides below `min_side`, more
    than `max_ratio` times as long as wide, or the other way round.
    """

    pixels: int
    multiple: int
    is_most: bool
    min_side: int
    max_ratio: int

    def fault(self, size: Size) -> str | None:
        """Why a picture is refused, after its field's name."""
        width, height = size
        if min(size) < self.min_side:
            return f"must have sides of at least {self.min_side} pixels, got {width}x{height}"
        if max(size) > self.max_ratio * min(size):
            return f"must have sides of at most 1:{self.max_ratio}, got {width}x{height}"
        return None

    def scaled(self, size: Size) -> Size:
        """What a reference is resized to, before anything is cut off."""
        width, height = size
        if self.is_most:
            factor = math.sqrt(self.pixels / (width * height))
            return size if width * height <= self.pixels else (int(width * factor), int(height * factor))
        ratio = width / height
        exact = math.sqrt(self.pixels * ratio)
        return self._nearest(exact), self._nearest(exact / ratio)

    def size(self, size: Size) -> Size:
        """What a reference of this size becomes."""
        width, height = (side // self.multiple * self.multiple for side in self.scaled(size))
        return width, height

    @property
    def max_pixels(self) -> int:
        """Of one reference; the nearest multiples may be half of one above the exact sides."""
        square, bound = self.multiple**2, float(self.pixels)
        if not self.is_most:
            stretch, half = math.sqrt(self.max_ratio), self.multiple / 2
            bound += half * math.sqrt(self.pixels) * (stretch + 1 / stretch) + half * half
        return int(bound) // square * square

    def _nearest(self, pixels: float) -> int:
        return max(round(pixels / self.multiple), 1) * self.multiple


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Shapes and limits of one model.

    `family`: the name of its modules in `families/` and `models/`. `segments`: parts of the sequence, each split over
    members by itself, in the order in which attention sees them. `fields`: the tensors of a request's state. `inputs`:
    optional fields of a request (`ImageRequest`) that it takes. `guidance`: what holds for requests without. `weights`:
    how many numbers each component has. `heads_per_key`: so many heads of queries share one of keys and values.

    Of models that take pictures: at most `max_pictures` a request. They are references, which steps attend to, where
    there are `reference_sizes`: those that the model knows, to one of which each is resized; or a `reference_area`, in
    which each keeps its shape. They are in one segment, in the order in which a request has them. Else the result
    begins with the picture, and `strength` is what holds for requests without.
    """

    name: str
    path: str
    family: str
    num_heads: int
    head_dim: int
    heads_per_key: int = 1
    segments: tuple[Rows, ...]
    fields: tuple[SlotField, ...]
    max_branches: int = 1
    scheduler: SchedulerSpec
    num_steps: int
    guidance: float
    max_text_tokens: int
    sizes: Sizes
    inputs: frozenset[str] = frozenset()
    max_pictures: int = 0
    reference_sizes: tuple[Size, ...] = ()
    reference_area: ReferenceArea | None = None
    strength: float | None = None
    weights: tuple[tuple[str, int], ...] = ()

    @property
    def latents(self) -> SlotField:
        """The field that steps change."""
        return next(field for field in self.fields if field.changes)

    @property
    def hidden_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def num_key_heads(self) -> int:
        """Of keys and values, which are what members of a group share out, each with its queries."""
        return self.num_heads // self.heads_per_key

    @property
    def qkv_width(self) -> int:
        """Of a token's queries, keys and values."""
        return (self.num_heads + 2 * self.num_key_heads) * self.head_dim

    @property
    def stepped(self) -> int:
        """The segment that latents belong to."""
        return self.segments.index("image")

    @property
    def takes_references(self) -> bool:
        """Whether the pictures of requests are references."""
        return bool(self.reference_sizes) or self.reference_area is not None

    @property
    def max_reference_pixels(self) -> int:
        """Of one reference, as the model takes it."""
        if self.reference_area is not None:
            return self.reference_area.max_pixels
        return max((width * height for width, height in self.reference_sizes), default=0)

    @property
    def max_reference_rows(self) -> int:
        """Of all references of a request."""
        return self.max_pictures * (self.max_reference_pixels // self.sizes.multiple**2)

    @property
    def max_input_bytes(self) -> int:
        """Of the pictures of a request, uint8."""
        if self.takes_references:
            return 3 * self.max_pictures * self.max_reference_pixels
        return (3 * self.max_pictures + ("mask" in self.inputs)) * self.sizes.max**2

    def reference_size(self, size: Size) -> Size:
        """What a reference of this size becomes: of known sizes the one nearest in shape."""
        if self.reference_area is not None:
            return self.reference_area.size(size)
        if size in self.reference_sizes:
            return size
        return min(self.reference_sizes, key=lambda known: (abs(size[0] / size[1] - known[0] / known[1]), known))

    def max_rows(self, kind: Rows) -> int:
        """The most rows that a segment, or a field of such rows, can have."""
        image = self.sizes.num_rows(self.sizes.max, self.sizes.max)
        most = {"text": self.max_text_tokens, "image": image, "reference": self.max_reference_rows, "one": 1}
        return most[kind]

    def shape(self, width: int, height: int, num_branches: int = 1, references: tuple[Size, ...] = ()) -> StepShape:
        """Of a picture of `width` × `height` pixels, with as much text as there can be. `references`: sizes of pictures
        that are attended to."""
        return StepShape(
            width=width,
            height=height,
            image=self.sizes.num_rows(width, height),
            reference=sum(self.sizes.num_rows(*size) for size in references),
            references=references,
            text=(self.max_text_tokens,) * num_branches,
        )

    @property
    def largest_shape(self) -> StepShape:
        """Of the largest picture in one branch, with as many references as there can be."""
        return self.shape(self.sizes.max, self.sizes.max, references=self._largest_references)

    @property
    def _largest_references(self) -> tuple[Size, ...]:
        """Sizes of as many as there can be, with as many pixels as there can be."""
        if (area := self.reference_area) is not None:
            return ((area.max_pixels // area.multiple, area.multiple),) * self.max_pictures
        most = max(self.reference_sizes, key=lambda size: self.sizes.num_rows(*size), default=None)
        return () if most is None else (most,) * self.max_pictures

    def legal_degrees(self, num_devices: int, num_branches: int = 1) -> tuple[int, ...]:
        """See the function of that name."""
        return legal_degrees(self.num_key_heads, num_branches, num_devices)


@functools.lru_cache
def legal_degrees(num_heads: int, num_branches: int, num_devices: int) -> tuple[int, ...]:
    """Degrees that a step may be run at, ascending: 1 … 9, 12, 13, 14, 23, 24 for 24 heads on many devices.

    Where the degree is a multiple of the branches, those go apart, each on its share of the devices; else in turn, each
    on all of them. The heads of a branch go to its devices as evenly as they can, and attention takes as long as the
    device with most of them; everything else is split by rows. At most `MAX_UNEVENNESS` of attention's device time may
    be lost by that. Whether a degree pays is for the measured cost table to say: policies use one that it has, if a
    step is 2 % faster than at every narrower degree.
    """

    def is_legal(degree: int) -> bool:
        divisible = degree % num_branches == 0
        members = degree // num_branches if divisible else degree
        most = -(-num_heads // members)
        return members <= num_heads and most * members <= MAX_UNEVENNESS * num_heads

    return tuple(degree for degree in range(1, num_devices + 1) if is_legal(degree))
