"""The measured cost table (`Profile`): what a step, an encode and a decode cost for each size and degree.

A value: it never changes, knows no clock and no device. `correction.CostModel` makes new ones from observed times.

Costs are asked for by the text of a `CostKey`. What was not measured is estimated from classes with as many guidance
branches, by the number of pixels (proportional to image rows) plus 256 a reference row: log-log interpolation between
the neighbouring classes; outside, the slope of the outermost pair continues, clamped to [0, 2] (attention is quadratic
at worst), or cost is proportional where only one class is known. Values of smaller classes act as a lower bound for
larger ones, so that noise in the table cannot make a larger picture cheaper. Where no class has as many branches, see
`in_branches`.

Pictures that a request brings are encoded as part of its encode: one costs half as much as decoding as many pixels,
until it is measured.
"""

import bisect
import functools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import msgspec

from tetrion.engine.shape import CostKey, parse_cost_key
from tetrion.engine.stages import Stage

MAX_SLOPE = 2.0
MIN_COST_S = 1e-9
MEMO_KEYS = 1024
PIXELS_PER_REFERENCE_ROW = 256
ENCODING_OF_DECODING = 0.5
"""An autoencoder's encoder has about half of its decoder's work."""

Points = list[tuple[int, float]]
"""(Pixels, cost), ascending."""


class ClassCost(msgspec.Struct, frozen=True, kw_only=True):
    """Cost of one class. `step_ms`: degree -> milliseconds of one denoising step; `step_j`: degree -> joules of one
    step over all members (optional); `encode_ms` and `decode_ms` are on one device, `encode_j` and `decode_j` its
    joules (optional)."""

    step_ms: dict[int, float]
    encode_ms: float
    decode_ms: float
    step_j: dict[int, float] = {}
    encode_j: float | None = None
    decode_j: float | None = None

    @classmethod
    def of(
        cls,
        step_ms: dict[int, float],
        aux_ms: Mapping[Stage, float],
        step_j: dict[int, float],
        aux_j: Mapping[Stage, float],
    ) -> Self:
        return cls(
            step_ms=step_ms,
            encode_ms=aux_ms["encode"],
            decode_ms=aux_ms["decode"],
            step_j=step_j,
            encode_j=aux_j.get("encode"),
            decode_j=aux_j.get("decode"),
        )

    @property
    def aux_ms(self) -> dict[Stage, float]:
        """Of all stages but denoising."""
        return {"encode": self.encode_ms, "decode": self.decode_ms}

    @property
    def aux_j(self) -> dict[Stage, float]:
        """Of those of them whose joules are known."""
        joules: dict[Stage, float | None] = {"encode": self.encode_j, "decode": self.decode_j}
        return {stage: known for stage, known in joules.items() if known is not None}


class SizeCost(msgspec.Struct, frozen=True, kw_only=True):
    """Cost of one key, measured or estimated (`is_estimated`). `step_by_degree_s` has only the profile's own degrees,
    `step_by_degree_j` (joules over all members) those of them for which some class has joules. `aux_s`: seconds of the
    other stages, each on one device; `aux_j`: joules of those for which they are known, never estimated."""

    degrees: tuple[int, ...]
    step_by_degree_s: dict[int, float]
    aux_s: dict[Stage, float]
    step_by_degree_j: dict[int, float] = {}
    aux_j: dict[Stage, float] = {}
    is_estimated: bool = False

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

    `heads`: attention heads of the model. `classes`: text of a `CostKey` ("WIDTHxHEIGHT") -> cost. The other fields say
    where the figures come from; further ones go under `meta` (unknown fields of a file are ignored). Raises ValueError
    when malformed.
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
    def _memo(self) -> dict[str, SizeCost]:
        # Not part of the value: what `cost` has worked out so far.
        return {}

    @functools.cached_property
    def _by_branches(self) -> dict[int, "_Curves"]:
        keys = {parse_cost_key(text): cost for text, cost in self.classes.items()}
        keys = {key: cost for key, cost in keys.items() if not key.pictures} or keys
        return {
            num_branches: _Curves({key: cost for key, cost in keys.items() if key.num_branches == num_branches})
            for num_branches in sorted({key.num_branches for key in keys})
        }

    def with_classes(self, changed: Mapping[str, ClassCost]) -> "Profile":
        """The same table with other costs of some classes, or with more classes. What was worked out of the classes
        that it names and that do not change is kept: a correction concerns one of them, many times a minute."""
        other = msgspec.structs.replace(self, classes={**self.classes, **changed})
        before = [self.classes[name].step_j if name in self.classes else {} for name in changed]
        if before == [cost.step_j for cost in changed.values()]:  # joules are estimated from those of all classes
            for key, cost in self._memo.items():
                names = {key, _transposed(key)}
                if not names.isdisjoint(self.classes) and names.isdisjoint(changed):
                    other._memo[key] = cost
        return other

    def with_branches(self, num_branches: int) -> "Profile":
        """The same table with classes of so many guidance branches, estimated from the others if there are none."""
        if num_branches in self._by_branches:
            return self
        estimated = {}
        for text in self.classes:
            key = msgspec.structs.replace(parse_cost_key(text), num_branches=num_branches).text
            estimated[key] = _as_class(self.cost(key))
        return self.with_classes(estimated)

    def cost(self, key: str) -> SizeCost:
        """Everything about one key, measured or estimated. Raises ValueError for what is no text of a `CostKey`."""
        found = self._memo.get(key)
        if found is None:
            worked_out = self._work_out(parse_cost_key(key))
            if len(self._memo) >= MEMO_KEYS:
                self._memo.clear()
            found = self._memo[key] = worked_out
        return found

    def measured(self, key: str) -> ClassCost | None:
        """The class of this key, or of the one with width and height exchanged; None: it would be estimated."""
        found = self.classes.get(key)
        return self.classes.get(_transposed(key)) if found is None else found

    def degrees(self, key: str) -> tuple[int, ...]:
        """Degrees with a known cost for this key, ascending. Policies use no others."""
        return self.cost(key).degrees

    def step_s(self, key: str, degree: int) -> float:
        """Seconds of one denoising step."""
        return self.cost(key).step_s(degree)

    def _work_out(self, key: CostKey) -> SizeCost:
        exact, curves = self.measured(key.text), self._by_branches.get(key.num_branches)
        if curves is None:
            known = min(self._by_branches)
            other = self.cost(msgspec.structs.replace(key, num_branches=known).text)
            return in_branches(other, known, key.num_branches)
        if exact is None and key.pictures and not curves.have_pictures:
            return _with_pictures(self.cost(msgspec.structs.replace(key, pictures=0).text), key.pictures)
        if exact is None and key.reference:
            plain = self.cost(msgspec.structs.replace(key, reference=0).text)
            encoded = _with_pictures(plain, PIXELS_PER_REFERENCE_ROW * key.reference / key.pixels)
            return msgspec.structs.replace(curves.estimate(key), aux_s=encoded.aux_s)
        if exact is None:
            return curves.estimate(key)
        step = {d: exact.step_ms[d] / 1e3 for d in sorted(exact.step_ms)}
        return SizeCost(
            degrees=tuple(step),
            step_by_degree_s=step,
            aux_s={stage: ms / 1e3 for stage, ms in exact.aux_ms.items()},
            step_by_degree_j=curves.joules(step, key) | exact.step_j,
            aux_j=exact.aux_j,
        )


_Table = tuple[list[tuple[int, ClassCost]], int]
"""Classes by some measure of size, ascending, and the size that is asked for."""


class _Curves:
    """The classes with one number of guidance branches, and what lies between them."""

    def __init__(self, classes: Mapping[CostKey, ClassCost]) -> None:
        self.have_pictures = any(key.pictures for key in classes)
        self._by_work = sorted([(_work(key), cost) for key, cost in classes.items()], key=_first)
        self._by_pixels = sorted([(key.pixels, cost) for key, cost in classes.items()], key=_first)
        alone = {key: cost for key, cost in classes.items() if not key.reference} or classes
        self._without_references = sorted([(_work(key), cost) for key, cost in alone.items()], key=_first)

    def estimate(self, key: CostKey) -> SizeCost:
        table, work = self._by_work, _work(key)
        i = bisect.bisect_left(table, work, key=_first)
        neighbours = [cost for _, cost in table[max(i - 1, 0) : i + 1]]
        degrees = set.intersection(*(set(cost.step_ms) for cost in neighbours)) or set(neighbours[0].step_ms)
        step = {}
        for degree in sorted(degrees):
            step[degree] = _at([(n, c.step_ms[degree]) for n, c in table if degree in c.step_ms], work) / 1e3
        tables: dict[Stage, _Table] = {
            "encode": (self._without_references, work),
            "decode": (self._by_pixels, key.pixels),
        }
        return SizeCost(
            degrees=tuple(step),
            step_by_degree_s=step,
            aux_s={
                stage: _at([(n, c.aux_ms[stage]) for n, c in classes], size) / 1e3
                for stage, (classes, size) in tables.items()
            },
            step_by_degree_j=self.joules(step, key),
            is_estimated=True,
        )

    def joules(self, degrees: Iterable[int], key: CostKey) -> dict[int, float]:
        """Joules of a step, estimated for the degrees that some class has them for."""
        known = {d: [(n, c.step_j[d]) for n, c in self._by_work if d in c.step_j] for d in degrees}
        return {degree: _at(points, _work(key)) for degree, points in known.items() if points}


def _with_pictures(cost: SizeCost, count: float) -> SizeCost:
    """The same with so many pictures of this size encoded, too."""
    encode_s = cost.aux_s["encode"] + count * ENCODING_OF_DECODING * cost.aux_s["decode"]
    aux_j = {stage: joules for stage, joules in cost.aux_j.items() if stage != "encode"}
    return msgspec.structs.replace(cost, aux_s=cost.aux_s | {"encode": encode_s}, aux_j=aux_j, is_estimated=True)


def in_branches(cost: SizeCost, known: int, wanted: int) -> SizeCost:
    """The cost with `wanted` guidance branches, estimated from that with `known` ones.

    At a degree that `wanted` divides, the branches go apart: each on its share of the devices, all at once. At others
    they go in turn. (What partners send each other in between is negligible.) A prompt a branch is encoded.
    """
    step_s = _apart_or_in_turn(_alone(cost.step_by_degree_s, known, 1), wanted, 1)
    return SizeCost(
        degrees=tuple(step_s),
        step_by_degree_s=step_s,
        aux_s=cost.aux_s | {"encode": cost.aux_s["encode"] / known * wanted},
        step_by_degree_j=_apart_or_in_turn(_alone(cost.step_by_degree_j, known, known), wanted, wanted),
        aux_j={stage: joules for stage, joules in cost.aux_j.items() if stage != "encode"},
        is_estimated=True,
    )


def _alone(table: Mapping[int, float], num_branches: int, parts: int) -> dict[int, float]:
    """Degree -> cost of one of the branches. `parts`: how many of that cost those make that go apart (one time passes
    for all of them, but each takes its joules)."""
    in_turn = {degree: value / num_branches for degree, value in table.items() if degree % num_branches}
    return in_turn | {n // num_branches: value / parts for n, value in table.items() if n % num_branches == 0}


def _apart_or_in_turn(table: Mapping[int, float], num_branches: int, parts: int) -> dict[int, float]:
    """Degree -> cost of all branches, of which one costs what `table` says. `parts` as above."""
    costs = {degree: value * num_branches for degree, value in table.items() if degree % num_branches}
    costs |= {degree * num_branches: value * parts for degree, value in table.items()}
    return {degree: costs[degree] for degree in sorted(costs)}


def _as_class(cost: SizeCost) -> ClassCost:
    return ClassCost.of(
        {degree: step_s * 1e3 for degree, step_s in cost.step_by_degree_s.items()},
        {stage: aux_s * 1e3 for stage, aux_s in cost.aux_s.items()},
        dict(cost.step_by_degree_j),
        cost.aux_j,
    )


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


def _check_class(key: str, cost: ClassCost, heads: int) -> None:
    try:
        max_degree = heads * parse_cost_key(key).num_branches
    except ValueError as error:
        raise ValueError(f"profile: classes: {error}") from None
    where = f"profile: classes.{key}"
    if not cost.step_ms:
        raise ValueError(f"{where}.step_ms: must have at least one degree")
    for name, table in (("step_ms", cost.step_ms), ("step_j", cost.step_j)):
        _check_table(f"{where}.{name}", table, max_degree)
    for unit, values in (("ms", cost.aux_ms), ("j", cost.aux_j)):
        for stage, value in values.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{where}.{stage}_{unit}: must be at least 0 and finite, got {value}")


def _check_table(where: str, table: Mapping[int, float], max_degree: int) -> None:
    for degree, value in table.items():
        if not 1 <= degree <= max_degree:
            raise ValueError(f"{where}: degree {degree} must be from 1 to {max_degree} (heads × branches)")
        if not 0 < value < math.inf:
            raise ValueError(f"{where}.{degree}: must be above 0 and finite, got {value}")


@functools.lru_cache(MEMO_KEYS)
def _transposed(text: str) -> str:
    """The text of the key with width and height exchanged."""
    return parse_cost_key(text).transposed.text


def _work(key: CostKey) -> int:
    return key.pixels + PIXELS_PER_REFERENCE_ROW * key.reference


def _first(pair: tuple[int, Any]) -> int:
    return pair[0]


def _at(points: Points, pixels: int) -> float:
    """The value at `pixels` of the curve through `points` (ascending), as the module docstring says."""
    curve: Points = []
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
