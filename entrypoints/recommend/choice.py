"""`tetrion recommend`: from measured configurations to the one that takes least energy and is still in time.

Pure: `frontier` and `recommend` are functions of a list of `Configuration`. Where those come from is in
`sources.py`, what is drawn of them in `picture.py`.
"""

import math
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np

Confidence = Literal["intervals apart", "intervals overlap", "unknown"]


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """One measured way of drawing one kind of picture. `latency_s`: mean from start to end of a batch; `latencies_s`:
    of each, where the source says. `ci95`: interval of `joules_per_image`, None where the source says none."""

    system: str
    model: str
    gpu: str
    width: int
    height: int
    num_steps: int
    num_gpus: int
    ulysses_degree: int
    batch: int
    joules_per_image: float
    latency_s: float
    ring_degree: int = 1
    ci95: tuple[float, float] | None = None
    latencies_s: tuple[float, ...] = ()
    watts: float | None = None

    def at_percentile(self, percentile: float | None) -> float | None:
        """Seconds that this share of pictures is drawn in; without one, the mean. None if it is not known."""
        if percentile is None:
            return self.latency_s
        return float(np.percentile(self.latencies_s, percentile)) if self.latencies_s else None

    @property
    def text(self) -> str:
        """How it is set up, in words."""
        ring = f", ring {self.ring_degree}" if self.ring_degree > 1 else ""
        gpus = f"{self.num_gpus} GPU" + ("s" if self.num_gpus > 1 else "")
        return f"{gpus}, Ulysses {self.ulysses_degree}{ring}, batch {self.batch}"


class Recommendation(msgspec.Struct, frozen=True, kw_only=True):
    """`saved_j` and `saved_share`: of the choice against the fastest; `is_claimed`: whether their intervals are apart.
    `note`: what the reader should know. `frontier`: nothing else is both faster and takes less."""

    deadline_s: float
    percentile: float | None
    choice: Configuration
    choice_latency_s: float
    fastest: Configuration
    saved_j: float
    saved_share: float
    confidence: Confidence
    is_claimed: bool
    note: str
    frontier: tuple[Configuration, ...]
    num_considered: int


class NothingInTime(ValueError):
    """No configuration meets the deadline; the message names the fastest."""


def frontier(configurations: Sequence[Configuration], percentile: float | None = None) -> tuple[Configuration, ...]:
    """Those that no other beats in both latency and joules, fastest first."""
    best_j, found = math.inf, []
    for configuration in sorted(_known(configurations, percentile), key=lambda c: _order(c, percentile)):
        if configuration.joules_per_image < best_j:
            best_j = configuration.joules_per_image
            found.append(configuration)
    return tuple(found)


def recommend(
    configurations: Sequence[Configuration],
    deadline_s: float,
    *,
    percentile: float | None = None,
    max_gpus: int | None = None,
) -> Recommendation:
    """The least joules a picture among those that are in time. Raises NothingInTime, or ValueError without any."""
    allowed = [c for c in configurations if max_gpus is None or c.num_gpus <= max_gpus]
    known = _known(allowed, percentile)
    if not known:
        what = "has latencies of single pictures, which a percentile needs" if allowed else "is left to choose from"
        raise ValueError(f"recommend: no configuration {what}")
    fastest = min(known, key=lambda c: _order(c, percentile))
    in_time = [c for c in known if _seconds(c, percentile) <= deadline_s]
    if not in_time:
        raise NothingInTime(
            f"deadline: nothing is drawn within {deadline_s:g} s;"
            f" the fastest takes {_seconds(fastest, percentile):.3g} s"
            f" ({fastest.text}, {fastest.joules_per_image:.0f} J)"
        )
    choice = min(in_time, key=lambda c: (c.joules_per_image, _seconds(c, percentile), c.num_gpus))
    confidence = _confidence(choice, fastest)
    saved_j = fastest.joules_per_image - choice.joules_per_image
    return Recommendation(
        deadline_s=deadline_s,
        percentile=percentile,
        choice=choice,
        choice_latency_s=_seconds(choice, percentile),
        fastest=fastest,
        saved_j=saved_j,
        saved_share=saved_j / fastest.joules_per_image if fastest.joules_per_image else 0.0,
        confidence=confidence,
        is_claimed=confidence == "intervals apart" and saved_j > 0,
        note=_note(choice, fastest, confidence),
        frontier=frontier(allowed, percentile),
        num_considered=len(known),
    )


def _known(configurations: Sequence[Configuration], percentile: float | None) -> list[Configuration]:
    return [c for c in configurations if c.at_percentile(percentile) is not None]


def _seconds(configuration: Configuration, percentile: float | None) -> float:
    seconds = configuration.at_percentile(percentile)
    assert seconds is not None
    return seconds


def _order(configuration: Configuration, percentile: float | None) -> tuple[float, float]:
    return _seconds(configuration, percentile), configuration.joules_per_image


def _confidence(choice: Configuration, fastest: Configuration) -> Confidence:
    if choice.ci95 is None or fastest.ci95 is None:
        return "unknown"
    return "intervals apart" if choice.ci95[1] < fastest.ci95[0] else "intervals overlap"


def _note(choice: Configuration, fastest: Configuration, confidence: Confidence) -> str:
    if choice is fastest:
        return "the fastest is also the one that takes least in time: nothing is saved"
    match confidence:
        case "unknown":
            return "the source gives no intervals: the saving is the difference of two figures, not a claim"
        case "intervals overlap":
            return "the intervals overlap: no saving is claimed"
        case "intervals apart":
            return "the 95 % intervals are apart"
