"""When requests arrive: seeded arrival processes. Knows no size, no deadline.

`production` is made of sessions, as people who draw pictures are seen to arrive. A user comes, asks a number of times
(heavy-tailed), thinks in between (lognormal), and often wants several pictures at once; users come more often by day
than by night. `Sessions` holds the parameters and where they are from. Bursts follow by themselves, over any length of
time: see `dispersion`.
"""

from typing import Literal

import msgspec
import numpy as np

Arrivals = Literal["poisson", "gamma", "diurnal", "production"]
DAY_S = 86_400.0
GRID_PER_DAY = 1440


class Sessions(msgspec.Struct, frozen=True, kw_only=True):
    """What production arrivals are drawn from.

    `tail`, `size`: a session has at least k requests with probability (1 + (k − 1) / size) ** −tail (a Lomax law; its
    variance is infinite for `tail` ≤ 2). `gap_median_s`, `gap_sigma`: of the lognormal time between two requests of a
    session, of which none is above `longest_gap_s`. `pictures`: (how many a request asks for at once, share).
    `ramp`: sessions begin at a rate ∝ exp(ramp × cos(2π t / day)). `requests_per_min`: on average, all users together.

    The defaults were fitted to GenTD26, 24 days of a commercial text-to-image service published by Alibaba
    (github.com/alibaba/clusterdata, cluster-trace-v2026-GenAI, lora_request_trace.csv): 26,823 requests of 4,247 users.
    There, a session ending where a user pauses for 30 minutes, sessions have 4.5 requests on average (here 4.7);
    68, 26, 9.9, 3.2, 0.49 and 0.12 % have at least 2, 5, 10, 20, 50 and 100 (here 67, 27, 10, 3.2, 0.53, 0.13); gaps
    have a median of 67 s and a logarithm of standard deviation 1.1; 58, 8, 19 and 15 % of the requests are for 1, 2, 4
    and 8 pictures. `ramp` makes counts disperse as on single days there (median of 14 days with at least 2,000
    pictures; windows of 0.1, 1, 3, 10, 30, 100 and 300 mean gaps): 5.1, 6.5, 9.2, 22, 57, 160, 420.
    """

    tail: float = 2.2
    size: float = 5.0
    gap_median_s: float = 67.0
    gap_sigma: float = 1.1
    longest_gap_s: float = 1800.0
    pictures: tuple[tuple[int, float], ...] = ((1, 0.58), (2, 0.08), (4, 0.19), (8, 0.15))
    ramp: float = 2.8
    requests_per_min: float = 0.81

    def __post_init__(self) -> None:
        bounds = (
            ("tail", 1 < self.tail < np.inf, "above 1 and finite"),
            ("size", 0 < self.size < np.inf, "above 0 and finite"),
            ("gap_median_s", 0 < self.gap_median_s <= self.longest_gap_s, "above 0 and at most longest_gap_s"),
            ("gap_sigma", 0 <= self.gap_sigma <= 5, "from 0 to 5"),
            ("longest_gap_s", self.longest_gap_s < DAY_S, "below a day"),
            ("pictures", all(n >= 1 and share > 0 for n, share in self.pictures), "of at least one, with a share"),
            ("pictures", bool(self.pictures), "at least one number"),
            ("ramp", 0 <= self.ramp <= 20, "from 0 to 20"),
            ("requests_per_min", 0 < self.requests_per_min < np.inf, "above 0 and finite"),
        )
        for field, is_fine, expected in bounds:
            if not is_fine:
                raise ValueError(f"sessions.{field}: must be {expected}, got {getattr(self, field)!r}")

    @property
    def requests_per_session(self) -> float:
        """The mean."""
        k = np.arange(100_000)
        rest = self.size / (self.tail - 1) * (1 + (k.size - 0.5) / self.size) ** (1 - self.tail)
        return float(((1 + k / self.size) ** -self.tail).sum() + rest)

    @property
    def pictures_per_request(self) -> float:
        """The mean."""
        return sum(n * share for n, share in self.pictures) / sum(share for _, share in self.pictures)


SESSIONS = Sessions()


def poisson(draw: np.random.Generator, num: int, mean_s: float) -> np.ndarray:
    """`num` times in seconds, ascending, on average `mean_s` apart, as of every process here."""
    return np.cumsum(draw.exponential(mean_s, num))


def gamma(draw: np.random.Generator, num: int, mean_s: float, burstiness: float) -> np.ndarray:
    """`burstiness`: coefficient of variation of the times between arrivals; 1 is Poisson."""
    shape = burstiness**-2
    return np.cumsum(draw.gamma(shape, mean_s / shape, num))


def diurnal(draw: np.random.Generator, num: int, mean_s: float, period_s: float, swing: float) -> np.ndarray:
    """At a rate of (1 − swing × cos(2π t / period_s)) / mean_s: unit-rate arrivals, each moved to when that has
    summed up to as much, found by bisection."""
    expected = np.cumsum(draw.exponential(1.0, num))
    rate_per_s, turn = 1 / mean_s, 2 * np.pi / period_s
    around = swing / turn
    low, high = expected / rate_per_s - around, expected / rate_per_s + around
    for _ in range(60):
        middle = (low + high) / 2
        too_early = rate_per_s * (middle - around * np.sin(turn * middle)) < expected
        low, high = np.where(too_early, middle, low), np.where(too_early, high, middle)
    return np.maximum(high, 0.0)


def production(draw: np.random.Generator, num: int, mean_s: float, sessions: Sessions = SESSIONS) -> np.ndarray:
    """`num` pictures of sessions as they arrive from some time of the day on, in the sessions' own time; then all of it
    is compressed or stretched, as a recorded trace is, so that just these pictures are `mean_s` apart on average."""
    pictures_per_min = sessions.requests_per_min * sessions.pictures_per_request
    days = 2.0 + 1.5 * num / (pictures_per_min * DAY_S / 60)
    while True:
        times_s = _pictures_s(draw, sessions, days * DAY_S)
        begin_s = DAY_S + draw.uniform(0, DAY_S)  # what began the day before is under way
        times_s = times_s[times_s >= begin_s][:num] - begin_s
        if times_s.size == num and times_s[-1] > 0:
            return times_s * (num * mean_s / times_s[-1])
        days *= 1.5


def _pictures_s(draw: np.random.Generator, sessions: Sessions, span_s: float) -> np.ndarray:
    """Times of all pictures whose session begins within `span_s`."""
    per_s = sessions.requests_per_min / 60 / sessions.requests_per_session
    starts_s = _ramped(draw, draw.poisson(per_s * span_s), span_s, sessions.ramp)
    num = session_sizes(draw, starts_s.size, sessions)
    gaps_s = sessions.gap_median_s * np.exp(sessions.gap_sigma * draw.standard_normal(int(num.sum())))
    gaps_s = np.minimum(gaps_s, sessions.longest_gap_s)
    first = np.cumsum(num) - num
    since_s = np.cumsum(gaps_s)
    times_s = np.repeat(starts_s - since_s[first], num) + since_s
    shares = np.array([share for _, share in sessions.pictures])
    many = np.array([n for n, _ in sessions.pictures])
    return np.sort(np.repeat(times_s, draw.choice(many, times_s.size, p=shares / shares.sum())))


def session_sizes(draw: np.random.Generator, num: int, sessions: Sessions) -> np.ndarray:
    """How many requests each of `num` sessions has."""
    return 1 + np.floor(sessions.size * draw.pareto(sessions.tail, num)).astype(int)


def _ramped(draw: np.random.Generator, num: int, span_s: float, ramp: float) -> np.ndarray:
    """`num` independent times within `span_s` at a rate ∝ exp(ramp × cos(2π t / day))."""
    grid_s = np.linspace(0, span_s, max(2, int(GRID_PER_DAY * span_s / DAY_S)))
    rate = np.exp(ramp * (np.cos(2 * np.pi * grid_s / DAY_S) - 1))
    summed = np.concatenate([[0.0], np.cumsum((rate[1:] + rate[:-1]) / 2)])
    return np.interp(draw.uniform(0, summed[-1], num), summed, grid_s)


def gap_variation(times_s: np.ndarray) -> float:
    """Coefficient of variation of the times between arrivals."""
    gaps_s = np.diff(times_s)
    return float(gaps_s.std() / gaps_s.mean())


def dispersion(times_s: np.ndarray, window_s: float) -> float:
    """Index of dispersion: variance over mean of the number of arrivals in consecutive windows. 1 for Poisson arrivals,
    whatever the window; it grows with the window where bursts outlast it. NaN for less than two windows."""
    num = int((times_s[-1] - times_s[0]) / window_s)
    if num < 2:
        return float("nan")
    counts = np.histogram(times_s, bins=num, range=(times_s[0], times_s[0] + num * window_s))[0]
    return float(counts.var() / counts.mean())
