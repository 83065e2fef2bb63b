"""The measured cost table (`Profile`): what a step, an encode and a decode cost for each size and degree.

A value: it never changes, knows no clock and no device. `correction.CostModel` makes new ones from observed times.

Sizes that were not measured are estimated from the number of pixels (proportional to image tokens): log-log
interpolation between the neighbouring classes; outside, the slope of the outermost pair continues, clamped to
[0, 2] (attention is quadratic at worst), or cost is proportional to tokens where only one class is known. Values of
smaller classes act as a lower bound for larger ones, so that noise in the table cannot make a larger picture cheaper.
"""

import bisect
import functools
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

MAX_SLOPE = 2.0
MIN_COST_S = 1e-9
MEMO_SIZES = 1024

_SIZE = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})")


class ClassCost(msgspec.Struct, frozen=True, kw_only=True):
    """Cost of one size. `step_ms`: degree -> milliseconds of one denoising step; `step_j`: degree -> joules of one
    step over all members (optional); `encode_ms` and `decode_ms` are on one device, `encode_j` and `decode_j` its
    joules (optional)."""

    step_ms: dict[int, float]
    encode_ms: float
    decode_ms: float
    step_j: dict[int, float] = {}
    encode_j: float | None = None
    decode_j: float | None = None


class SizeCost(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """Cost of one size, measured or estimated. `step_by_degree_s` has only the profile's own degrees,
    `step_by_degree_j` (joules over all members) those of them for which some size has joules; `encode_j` and `decode_j`
    are never estimated."""

    degrees: tuple[int, ...]
    step_by_degree_s: dict[int, float]
    encode_s: float
    decode_s: float
    step_by_degree_j: dict[int, float] = {}
    encode_j: float | None = None
    decode_j: float | None = None

    @functools.cached_property
    def derived(self) -> dict[Any, Any]:
        """Not part of the value: what others have worked out from it and keep for as long as it lives."""
        return {}

    def step_s(self, degree: int) -> float:
        """Seconds of one step at `degree`. A degree that the table lacks (a forced one) is estimated: log-log between
        its neighbours; below the narrowest proportional to 1 / degree; beyond the widest no faster than it."""
        known = self.step_by_degree_s.get(degree)
        if known is not None:
            return known
        if degree < 1:
            raise ValueError(f"degree: must be at least 1, got {degree}")
        i = bisect.bisect_left(self.degrees, degree)
        if i == 0:
            return self.step_by_degree_s[self.degrees[0]] * self.degrees[0] / degree
        if i == len(self.degrees):
            return self.step_by_degree_s[self.degrees[-1]]
        low, high = self.degrees[i - 1], self.degrees[i]
        return _log_log(low, self.step_by_degree_s[low], high, self.step_by_degree_s[high], degree)


class Profile(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """Measured cost table of one model on one kind of device; a table written by hand works.

    `heads`: attention heads of the model. `classes`: "WIDTHxHEIGHT" -> cost. The other fields say where the figures
    come from; further ones go under `meta` (unknown fields of a file are ignored). Raises ValueError when malformed.
    """

    heads: int
    classes: dict[str, ClassCost]
    gpu: str = ""
    model: str = ""
    commit: str = ""
    command: str = ""
    meta: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise ValueError(f"profile: heads: must be at least 1, got {self.heads}")
        if not self.classes:
            raise ValueError("profile: classes: must name at least one size")
        for key, cost in self.classes.items():
            _check_class(key, cost, self.heads)

    @functools.cached_property
    def _memo(self) -> dict[tuple[int, int], SizeCost]:
        # Not part of the value: what `cost` has worked out so far.
        return {}

    @functools.cached_property
    def derived(self) -> dict[Any, Any]:
        """Not part of the value: what others have worked out from it and keep for as long as it lives."""
        return {}

    @functools.cached_property
    def _by_pixels(self) -> list[tuple[int, ClassCost]]:
        return sorted(((w * h, self.classes[f"{w}x{h}"]) for w, h in map(parse_size, self.classes)), key=_first)

    def with_classes(self, changed: Mapping[str, ClassCost]) -> "Profile":
        """The same table with other costs of some sizes, or with more sizes. What was worked out of the sizes that it
        names and that do not change is kept: a correction concerns one of them, many times a minute."""
        other = msgspec.structs.replace(self, classes={**self.classes, **changed})
        before = [self.classes[name].step_j if name in self.classes else {} for name in changed]
        if before == [cost.step_j for cost in changed.values()]:  # joules are estimated from those of all sizes
            for (width, height), cost in self._memo.items():
                names = {f"{width}x{height}", f"{height}x{width}"}
                if not names.isdisjoint(self.classes) and names.isdisjoint(changed):
                    other._memo[width, height] = cost
        return other

    def cost(self, width: int, height: int) -> SizeCost:
        """Everything about one size (pixels), measured or estimated."""
        found = self._memo.get((width, height))
        if found is None:
            if width < 1 or height < 1:
                raise ValueError(f"size: width and height must be at least 1, got {width}x{height}")
            if len(self._memo) >= MEMO_SIZES:
                self._memo.clear()
            found = self._memo[width, height] = self._work_out(width, height)
        return found

    def degrees(self, width: int, height: int) -> tuple[int, ...]:
        """Degrees with a known cost at this size, ascending. Policies use no others."""
        return self.cost(width, height).degrees

    def step_s(self, width: int, height: int, degree: int) -> float:
        """Seconds of one denoising step."""
        return self.cost(width, height).step_s(degree)

    def encode_s(self, width: int, height: int) -> float:
        """Seconds of the text encode (and the starting noise) of one request of this size."""
        return self.cost(width, height).encode_s

    def decode_s(self, width: int, height: int) -> float:
        """Seconds of the VAE decode of one picture."""
        return self.cost(width, height).decode_s

    def _work_out(self, width: int, height: int) -> SizeCost:
        exact = self.classes.get(f"{width}x{height}") or self.classes.get(f"{height}x{width}")
        table, pixels = self._by_pixels, width * height
        if exact is not None:
            step = {d: exact.step_ms[d] / 1e3 for d in sorted(exact.step_ms)}
            return SizeCost(
                degrees=tuple(step),
                step_by_degree_s=step,
                encode_s=exact.encode_ms / 1e3,
                decode_s=exact.decode_ms / 1e3,
                step_by_degree_j=self._joules(step, pixels) | exact.step_j,
                encode_j=exact.encode_j,
                decode_j=exact.decode_j,
            )
        i = bisect.bisect_left(table, pixels, key=_first)
        neighbours = [cost for _, cost in table[max(i - 1, 0) : i + 1]]
        degrees = set.intersection(*(set(cost.step_ms) for cost in neighbours)) or set(neighbours[0].step_ms)
        step = {}
        for degree in sorted(degrees):
            step[degree] = _at([(n, c.step_ms[degree]) for n, c in table if degree in c.step_ms], pixels) / 1e3
        return SizeCost(
            degrees=tuple(step),
            step_by_degree_s=step,
            encode_s=_at([(n, c.encode_ms) for n, c in table], pixels) / 1e3,
            decode_s=_at([(n, c.decode_ms) for n, c in table], pixels) / 1e3,
            step_by_degree_j=self._joules(step, pixels),
        )

    def _joules(self, degrees: Iterable[int], pixels: int) -> dict[int, float]:
        """Joules of a step, estimated for the degrees that some size has them for."""
        known = {d: [(n, c.step_j[d]) for n, c in self._by_pixels if d in c.step_j] for d in degrees}
        return {degree: _at(points, pixels) for degree, points in known.items() if points}


def parse_profile(data: bytes | str) -> Profile:
    """A profile from its JSON text.

    Raises ValueError naming the field and the bound.
    """
    try:
        return msgspec.json.decode(data, type=Profile)
    except msgspec.ValidationError as error:
        text = str(error)
        raise ValueError(text if text.startswith("profile:") else f"profile: {text}") from None
    except msgspec.DecodeError as error:
        raise ValueError(f"profile: not JSON: {error}") from None


def read_profile(path: Path) -> Profile:
    """A profile from a file. Raises ValueError (malformed) or OSError (unreadable)."""
    try:
        return parse_profile(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of "WIDTHxHEIGHT"; ValueError if it is not of that form."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f'profile: classes: expected sizes like "1024x1024", got {text!r}')
    return int(match[1]), int(match[2])


def _check_class(key: str, cost: ClassCost, heads: int) -> None:
    parse_size(key)
    where = f"profile: classes.{key}"
    if not cost.step_ms:
        raise ValueError(f"{where}.step_ms: must have at least one degree")
    for name, table in (("step_ms", cost.step_ms), ("step_j", cost.step_j)):
        _check_table(f"{where}.{name}", table, heads)
    for name, value in (("encode_ms", cost.encode_ms), ("decode_ms", cost.decode_ms)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{where}.{name}: must be at least 0 and finite, got {value}")
    for name, joules in (("encode_j", cost.encode_j), ("decode_j", cost.decode_j)):
        if joules is not None and not 0 <= joules < math.inf:
            raise ValueError(f"{where}.{name}: must be at least 0 and finite, got {joules}")


def _check_table(where: str, table: Mapping[int, float], heads: int) -> None:
    for degree, value in table.items():
        if not 1 <= degree <= heads:
            raise ValueError(f"{where}: degree {degree} must be from 1 to {heads} (heads)")
        if not 0 < value < math.inf:
            raise ValueError(f"{where}.{degree}: must be above 0 and finite, got {value}")


def _first(pair: tuple[int, Any]) -> int:
    return pair[0]


def _at(points: list[tuple[int, float]], pixels: int) -> float:
    """The value at `pixels` of the curve through `points` (ascending), as the module docstring says."""
    curve: list[tuple[int, float]] = []
    highest = MIN_COST_S
    for n, value in points:
        highest = max(highest, value)
        if curve and curve[-1][0] == n:
            curve[-1] = (n, highest)
        else:
            curve.append((n, highest))
    if len(curve) == 1:
        return curve[0][1] * pixels / curve[0][0]
    i = min(max(bisect.bisect_left(curve, pixels, key=_first), 1), len(curve) - 1)
    return _log_log(*curve[i - 1], *curve[i], pixels)


def _log_log(x0: float, y0: float, x1: float, y1: float, x: float) -> float:
    """The power law through two points, evaluated at `x`; outside them with its exponent clamped to [0, 2]."""
    slope = math.log(y1 / y0) / math.log(x1 / x0)
    if not x0 <= x <= x1:
        slope = min(max(slope, 0.0), MAX_SLOPE)
    anchor_x, anchor_y = (x1, y1) if x > x1 else (x0, y0)
    return anchor_y * (x / anchor_x) ** slope
