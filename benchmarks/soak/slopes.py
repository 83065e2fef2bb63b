"""Does a figure grow? Its slope over time, with a 95 % confidence interval."""

import math
import statistics
from collections.abc import Sequence

import msgspec
from scipy import stats

WARM_UP = 0.25
"""Of the time, at the beginning, that is left out: pools fill, allocators settle."""
NUM_BLOCKS = 20
CONFIDENCE = 0.95


class Slope(msgspec.Struct, frozen=True, kw_only=True):
    """Per hour, with its interval; `mean` of the figure. `verdict`: *flat* if all of the interval is at or below
    `tolerance`, *grows* if all of it is above, else *unclear*: measure for longer."""

    mean: float
    per_hour: float
    low: float
    high: float
    tolerance: float
    verdict: str


def slope_of(times_s: Sequence[float], values: Sequence[float], tolerance: float) -> Slope | None:
    """Least squares through the means of `NUM_BLOCKS` stretches of time, as neighbouring samples say nearly the same
    and would make the interval too narrow. `tolerance`: growth in an hour that counts as none; in the time that was
    measured, if that is shorter. None: there are too few samples."""
    begin_s = times_s[0] + WARM_UP * (times_s[-1] - times_s[0]) if times_s else 0.0
    kept = [(time_s, value) for time_s, value in zip(times_s, values, strict=True) if time_s >= begin_s]
    size = -(-len(kept) // NUM_BLOCKS)
    blocks = [kept[start : start + size] for start in range(0, len(kept), size)] if size else []
    if len(blocks) < 4:
        return None
    hours = [statistics.fmean(time_s for time_s, _ in block) / 3600 for block in blocks]
    means = [statistics.fmean(value for _, value in block) for block in blocks]
    line = statistics.linear_regression(hours, means)
    residuals = [mean - line.intercept - line.slope * hour for hour, mean in zip(hours, means, strict=True)]
    spread = sum((hour - statistics.fmean(hours)) ** 2 for hour in hours)
    error = math.sqrt(sum(one * one for one in residuals) / (len(blocks) - 2) / spread)
    half = error * float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(blocks) - 2))
    low, high = line.slope - half, line.slope + half
    tolerance /= min(1.0, (kept[-1][0] - begin_s) / 3600)
    verdict = "flat" if high <= tolerance else "grows" if low > tolerance else "unclear"
    return Slope(
        mean=statistics.fmean(means),
        per_hour=line.slope,
        low=low,
        high=high,
        tolerance=tolerance,
        verdict=verdict,
    )
