"""Online correction of the cost tables: `CostModels`, the one mutable object of this folder. It knows no clock.

For each (model, cost key, stage, degree) it keeps an exponentially weighted mean of observed / predicted time. The
planner sees only `CostModels.tables`, a plain value.
"""

import math
from collections.abc import Mapping

from tetrion.engine.planning.cost.profile import ClassCost, Profile
from tetrion.engine.planning.cost.tables import CostTables
from tetrion.engine.shape import parse_cost_key
from tetrion.engine.stages import Stage

SMOOTHING = 0.1
CLIP = 2.0
MAX_RATIO = 100.0
MAX_KEYS = 256
TOLERANCE = 0.02
"""Steps take a few percent more or less each time, and a mean of ten or so wavers with them: below this, plans would
follow noise, and what is worked out of a cost would be worked out anew with every other answer."""

Mean = tuple[float, int]
"""Of ratios observed / predicted, and how many it is of, the prediction itself being the first."""

_What = int | Stage
"""What a time was observed of: a step at this degree, or another stage."""


def moved_mean(mean: float, count: int, ratio: float, smoothing: float = SMOOTHING) -> Mean:
    """A mean with one more observation. It counts `1 / (count + 1)` at first and never less than `smoothing`; it is
    clipped to within a factor of `CLIP` of the mean so far, so that one stalled step moves a cost by at most
    `smoothing`, while a prediction that is wrong by a large factor is still corrected in some dozen observations."""
    clipped = min(max(ratio, mean / CLIP), mean * CLIP)
    moved = mean + max(smoothing, 1 / (count + 1)) * (clipped - mean)
    return min(max(moved, 1 / MAX_RATIO), MAX_RATIO), count + 1


class CostModel:
    """A profile and what running with it has taught (`moved_mean`).

    Observed keys that the table lacks become classes of their own (at most `MAX_KEYS` of them). Where it has none with
    as many guidance branches, they come with an estimated class of that kind for each that it has.
    """

    def __init__(self, profile: Profile, *, smoothing: float = SMOOTHING) -> None:
        if not 0 < smoothing <= 1:
            raise ValueError(f"smoothing: must be above 0 and at most 1, got {smoothing}")
        self._base = profile
        self._smoothing = smoothing
        self._means: dict[str, dict[_What, Mean]] = {}
        self._profile = profile
        self._shown: dict[str, dict[_What, float]] = {}
        self._stale: set[str] = set()

    @property
    def profile(self) -> Profile:
        """The corrected profile; a new value only once some cost is more than `TOLERANCE` from what this one says, and
        new only in the classes for which that is so: what is worked out from a cost lives as long as it."""
        if self._stale:
            changed = {key: self._corrected_class(key, self._means[key]) for key in sorted(self._stale)}
            self._profile = self._profile.with_classes(changed)
            for key in self._stale:
                self._shown[key] = {what: mean for what, (mean, _) in self._means[key].items()}
            self._stale.clear()
        return self._profile

    def observe_step(self, key: str, degree: int, step_s: float) -> None:
        """One denoising step (or the mean of a chunk's steps) took `step_s` seconds on `degree` devices. Degrees that
        the table lacks are ignored, as are times that are not positive and finite."""
        if degree in self._base.degrees(key):
            self._observe(key, degree, step_s, self._base.step_s(key, degree))

    def observe_aux(self, key: str, stage: Stage, stage_s: float) -> None:
        """A stage other than denoising took `stage_s` seconds."""
        self._observe(key, stage, stage_s, self._base.cost(key).aux_s[stage])

    def _observe(self, key: str, what: _What, observed_s: float, predicted_s: float) -> None:
        if not 0 < observed_s < math.inf:
            return
        means = self._means.get(key)
        if means is None:
            if len(self._means) >= MAX_KEYS:
                return
            self._know_branches(parse_cost_key(key).num_branches)
            means = self._means[key] = {}
        ratio = MAX_RATIO if predicted_s <= 0 else observed_s / predicted_s
        means[what] = moved, _ = moved_mean(*means.get(what, (1.0, 1)), ratio, self._smoothing)
        shown = self._shown.get(key, {}).get(what, 1.0)
        if abs(moved / shown - 1) > TOLERANCE:
            self._stale.add(key)

    def _know_branches(self, num_branches: int) -> None:
        """A single class with so many branches would be all that others are estimated from: give it company."""
        base = self._base.with_branches(num_branches)
        if base is not self._base:
            self._base, self._profile = base, self._profile.with_branches(num_branches)

    def _corrected_class(self, key: str, means: dict[_What, Mean]) -> ClassCost:
        def ratio(what: _What) -> float:
            return means[what][0] if what in means else 1.0

        cost, known = self._base.cost(key), self._base.classes.get(key)
        return ClassCost.of(
            {degree: step_s * 1e3 * ratio(degree) for degree, step_s in cost.step_by_degree_s.items()},
            {stage: aux_s * 1e3 * ratio(stage) for stage, aux_s in cost.aux_s.items()},
            known.step_j if known is not None else {},
            known.aux_j if known is not None else {},
        )


class CostModels:
    """A `CostModel` for each model that the devices serve."""

    def __init__(self, profiles: Mapping[str, Profile]) -> None:
        self._models = {model: CostModel(profile) for model, profile in profiles.items()}
        self._tables = CostTables(profiles=dict(profiles))

    def __getitem__(self, model: str) -> CostModel:
        return self._models[model]

    @property
    def tables(self) -> CostTables:
        """The corrected tables; a new value only once one of them is."""
        profiles = self._tables.profiles
        if any([cost_model.profile is not profiles[model] for model, cost_model in self._models.items()]):
            self._tables = CostTables(profiles={model: m.profile for model, m in self._models.items()})
        return self._tables
