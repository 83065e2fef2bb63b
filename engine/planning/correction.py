"""Online correction of the cost table: `CostModel`, the one mutable object of this folder. It knows no clock.

For each (size, stage, degree) it keeps an exponentially weighted mean of observed / predicted time. The planner sees
only `CostModel.profile`, a plain value.
"""

import math

from tetrion.engine.planning.profile import ClassCost, Profile

SMOOTHING = 0.1
CLIP = 2.0
MAX_RATIO = 100.0
MAX_SIZES = 256
TOLERANCE = 0.02
"""Steps take a few percent more or less each time, and a mean of ten or so wavers with them: below this, plans would
follow noise, and what is worked out of a cost would be worked out anew with every other answer."""


class CostModel:
    """A profile and what running with it has taught.

    One observation counts `1 / (n + 1)` at first (the table itself counts as the first) and never less than
    `smoothing`; it is clipped to within a factor of `CLIP` of the mean so far, so that one stalled step moves a cost by
    at most `smoothing`, while a table that is wrong by a large factor is still corrected in some dozen observations.
    Observed sizes that the table lacks become classes of their own (at most `MAX_SIZES` of them).
    """

    def __init__(self, profile: Profile, *, smoothing: float = SMOOTHING) -> None:
        if not 0 < smoothing <= 1:
            raise ValueError(f"smoothing: must be above 0 and at most 1, got {smoothing}")
        self._base = profile
        self._smoothing = smoothing
        self._means: dict[tuple[int, int], dict[int | str, tuple[float, int]]] = {}
        self._profile = profile
        self._shown: dict[tuple[int, int], dict[int | str, float]] = {}
        self._stale: set[tuple[int, int]] = set()

    @property
    def profile(self) -> Profile:
        """The corrected profile; a new value only once some cost is more than `TOLERANCE` from what this one says, and
        new only in the sizes for which that is so: what is worked out from a cost lives as long as it."""
        if self._stale:
            changed = {f"{w}x{h}": self._corrected_class(w, h, self._means[w, h]) for w, h in sorted(self._stale)}
            self._profile = self._profile.with_classes(changed)
            for size in self._stale:
                self._shown[size] = {what: mean for what, (mean, _) in self._means[size].items()}
            self._stale.clear()
        return self._profile

    def observe_step(self, width: int, height: int, degree: int, step_s: float) -> None:
        """One denoising step (or the mean of a chunk's steps) took `step_s` seconds on `degree` devices. Degrees that
        the table lacks are ignored, as are times that are not positive and finite."""
        if degree in self._base.degrees(width, height):
            self._observe(width, height, degree, step_s, self._base.step_s(width, height, degree))

    def observe_encode(self, width: int, height: int, encode_s: float) -> None:
        """A text encode took `encode_s` seconds."""
        self._observe(width, height, "encode", encode_s, self._base.encode_s(width, height))

    def observe_decode(self, width: int, height: int, decode_s: float) -> None:
        """A VAE decode took `decode_s` seconds."""
        self._observe(width, height, "decode", decode_s, self._base.decode_s(width, height))

    def _observe(self, width: int, height: int, what: int | str, observed_s: float, predicted_s: float) -> None:
        if not 0 < observed_s < math.inf:
            return
        means = self._means.get((width, height))
        if means is None:
            if len(self._means) >= MAX_SIZES:
                return
            means = self._means[width, height] = {}
        mean, count = means.get(what, (1.0, 1))
        ratio = MAX_RATIO if predicted_s <= 0 else observed_s / predicted_s
        ratio = min(max(ratio, mean / CLIP), mean * CLIP)
        moved = mean + max(self._smoothing, 1 / (count + 1)) * (ratio - mean)
        moved = min(max(moved, 1 / MAX_RATIO), MAX_RATIO)
        means[what] = (moved, count + 1)
        shown = self._shown.get((width, height), {}).get(what, 1.0)
        if abs(moved / shown - 1) > TOLERANCE:
            self._stale.add((width, height))

    def _corrected_class(self, width: int, height: int, means: dict[int | str, tuple[float, int]]) -> ClassCost:
        def ratio(what: int | str) -> float:
            return means[what][0] if what in means else 1.0

        cost, known = self._base.cost(width, height), self._base.classes.get(f"{width}x{height}")
        return ClassCost(
            step_ms={degree: step_s * 1e3 * ratio(degree) for degree, step_s in cost.step_by_degree_s.items()},
            encode_ms=cost.encode_s * 1e3 * ratio("encode"),
            decode_ms=cost.decode_s * 1e3 * ratio("decode"),
            step_j=known.step_j if known is not None else {},
            encode_j=known.encode_j if known is not None else None,
            decode_j=known.decode_j if known is not None else None,
        )
