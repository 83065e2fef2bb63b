"""What `tetrion bench energy` measures: points of the sweep, their order, how long it takes. Pure."""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from tetrion.entrypoints.bench.workloads import Size

MIN_WINDOWS = 3
SHORTEST_WINDOW_S = 5.0
"""Energy counters move every ~100 ms: windows under 2 s are unstable, from 5 s on they are good."""
NUM_WARM_UPS = 2
"""Pictures of every point before its first window."""


class EnergyPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One configuration: every picture on `degree` devices at every step. `in_flight`: as many as keep all busy."""

    width: int
    height: int
    num_steps: int
    degree: int
    in_flight: int

    @property
    def text(self) -> str:
        return f"{self.width}x{self.height}, {self.num_steps} steps, degree {self.degree}, {self.in_flight} at once"


class SweepOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`window_s`: the shortest window. A point is measured at least `MIN_WINDOWS` times, and on until the 95 %
    interval's half-width is `target` of the mean or `budget_s` is over. `cool_s`: pause before every window."""

    sizes: tuple[Size, ...]
    num_steps: tuple[int, ...]
    degrees: tuple[int, ...]
    window_s: float = SHORTEST_WINDOW_S
    cool_s: float = 2.0
    target: float = 0.02
    budget_s: float = 3600.0
    seed: int = 0


def sweep_points(options: SweepOptions, num_devices: int) -> tuple[EnergyPoint, ...]:
    """Every size, number of steps and degree; all devices in use as far as the degree divides them."""
    return tuple(
        EnergyPoint(width=w, height=h, num_steps=steps, degree=degree, in_flight=max(1, num_devices // degree))
        for (w, h), steps, degree in itertools.product(options.sizes, options.num_steps, options.degrees)
    )


def shuffled(points: Sequence[EnergyPoint], options: SweepOptions, round_number: int) -> list[EnergyPoint]:
    """The order of one round: random, and the same for the same seed."""
    order = list(points)
    random.Random(f"{options.seed}-{round_number}").shuffle(order)
    return order


def pictures_per_lane(options: SweepOptions, latency_s: float) -> int:
    """So many pictures one after the other take at least a window, as far as the latency is right."""
    return max(1, int(np.ceil(options.window_s / max(latency_s, 1e-3))))


def least_duration_s(
    points: Sequence[EnergyPoint], options: SweepOptions, latency_s: Callable[[EnergyPoint], float | None]
) -> float:
    """Idle power, then warm-ups and `MIN_WINDOWS` windows of every point; where a latency is not known, no warm-up and
    windows of their least length."""
    total_s = options.cool_s + options.window_s
    for point in points:
        known_s = latency_s(point)
        window_s = options.window_s if known_s is None else pictures_per_lane(options, known_s) * known_s
        total_s += NUM_WARM_UPS * (known_s or 0.0) + MIN_WINDOWS * (options.cool_s + window_s)
    return total_s


def longest_duration_s(
    points: Sequence[EnergyPoint], options: SweepOptions, latency_s: Callable[[EnergyPoint], float | None]
) -> float:
    """Idle power, then either warm-ups alone, which no budget cuts short, or the budget and a window that was begun at
    its very end. Such a window's last picture may begin at its end too. A latency that is not known: one window."""
    known_s = [latency_s(point) for point in points]
    latencies_s = [options.window_s if one_s is None else one_s for one_s in known_s]
    window_s = options.cool_s + options.window_s
    return window_s + max(NUM_WARM_UPS * sum(latencies_s), options.budget_s + window_s + max(latencies_s))


def interval(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean and its 95 % interval by Student's t; None for a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    half = _t975(len(values) - 1) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return mean, (mean - half, mean + half)


def is_settled(values: Sequence[float], target: float) -> bool:
    """Whether the interval is narrow enough."""
    if len(values) < MIN_WINDOWS:
        return False
    mean, ci95 = interval(values)
    return ci95 is not None and ci95[1] - mean <= target * mean


def _t975(freedom: int) -> float:
    """Student's t at 97.5 %; from 11 degrees of freedom on within 2 % above the exact value."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    return table[freedom - 1] if freedom <= len(table) else 1.96 + 2.66 / freedom


def describe(
    points: Sequence[EnergyPoint], options: SweepOptions, latency_s: Callable[[EnergyPoint], float | None]
) -> dict[str, Any]:
    """The plan as `--dry-run` shows it."""
    least_s = least_duration_s(points, options, latency_s)
    at_most_s = longest_duration_s(points, options, latency_s)
    notes = ["the engine's start and end are not counted"]
    if any(latency_s(point) is None for point in points):
        notes.append(
            "latencies are not known yet: at_most_s takes each to be window_s, least_duration_s counts windows only"
        )
    if least_s > at_most_s:
        notes.append(f"budget_s is over before every point has {MIN_WINDOWS} windows")
    return {
        "points": [msgspec.to_builtins(point) for point in points],
        "first_round": [point.text for point in shuffled(points, options, 0)],
        "least_windows": MIN_WINDOWS * len(points),
        "window_s": options.window_s,
        "least_duration_s": round(least_s, 1),
        "at_most_s": round(at_most_s, 1),
        "note": "; ".join(notes),
    }
