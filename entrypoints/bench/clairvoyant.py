"""A clairvoyant upper bound on attainment: how many deadlines of a trace anybody could have met.

A mixed-integer linear program (HiGHS through scipy.optimize.milp) over a relaxed machine. Knows no policy.

*Formulation.* Time is cut at every arrival a, deadline d, earliest start of denoising a + encode and latest start of
decoding d − decode, into intervals k of length L_k. A request j with an SLO has

    x_j ∈ {0, 1}           whether it is finished by its deadline
    t_jkn ≥ 0              seconds of interval k in which it denoises on n devices, within [a + encode, d − decode]
    e_jk, c_jk ≥ 0         seconds of encoding within [a, d − decode] and of decoding within [a + encode, d]

    maximise  Σ_j x_j
    subject to  Σ_kn t_jkn / step_n ≥ num_steps · x_j     all its steps,
                Σ_k e_jk ≥ encode · x_j                   its encode
                Σ_k c_jk ≥ decode · x_j                   and its decode are done,
                Σ_n t_jkn + e_jk + c_jk ≤ L_k · x_j       one thing at a time,
                Σ_jn n · t_jkn + Σ_j (e_jk + c_jk) ≤ devices · L_k.

*Why it is an upper bound.* Take what any policy did with the requests it finished on time and ran as long as the cost
table says. Setting t, e and c to the seconds it spent in each interval satisfies every constraint, so the optimum is at
least as large. The program may do more: it knows all arrivals, cuts and resumes work at any instant, changes degree
for nothing, shares a device among requests, ignores which device is which, and drops requests without cost.

Only degrees on the upper concave hull of (n, 1 / step_n) have variables: an interval's time may be shared between two
degrees, so any other degree is worth no more than such a mixture.

*Long traces* are cut into blocks of consecutive requests, each of which has the whole machine to itself. The sum over
the blocks is an upper bound too (what a schedule does for one block is feasible for that block alone); larger blocks
bring it closer. Where the time limit ends the search, the solver's proven bound counts, not the solution it has.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from tetrion.engine.planning.cost.tables import CostTables
from tetrion.engine.planning.degrees import legal_for, usable_degrees
from tetrion.entrypoints.bench.workloads import TraceRequest
from tetrion.entrypoints.errors import InputError

DEFAULT_BLOCK = 150
DEFAULT_TIME_LIMIT_S = 60.0
SEARCH_GAP = 0.002
"""The search ends this near to the optimum; what it has proven by then is the bound."""
DEADLINE_TOLERANCE_S = 1e-6
"""Deadlines are this much later here, so that rounding never makes a bound lower than a schedule that just fits."""
SHORTEST_INTERVAL_S = 1e-7
"""Closer points in time are merged. That may shorten a window by so much, far less than deadlines are later."""


class Bound(msgspec.Struct, frozen=True, kw_only=True):
    """At most `num_met` of `num_with_slo` requests can meet their deadlines. `gap`: how many of `num_met` the search
    left open (0: somebody with all of these freedoms meets exactly `num_met`, each block for itself)."""

    num_met: int
    num_with_slo: int
    gap: int

    @property
    def attainment(self) -> float | None:
        """None if no request has an SLO."""
        return self.num_met / self.num_with_slo if self.num_with_slo else None


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What one request needs, in seconds. `hull`: (devices, steps per second), useful mixtures' corners."""

    arrival_s: float
    deadline_s: float
    encode_s: float
    decode_s: float
    num_steps: int
    hull: tuple[tuple[int, float], ...]

    @property
    def denoise_from_s(self) -> float:
        return self.arrival_s + self.encode_s

    @property
    def denoise_until_s(self) -> float:
        return self.deadline_s - self.decode_s

    @property
    def is_possible(self) -> bool:
        """Whether it meets its deadline with all devices to itself."""
        return self.num_steps / self.hull[-1][1] <= self.denoise_until_s - self.denoise_from_s


def attainment_bound(
    trace: Sequence[TraceRequest],
    tables: CostTables,
    num_devices: int,
    *,
    scale: float = 1.0,
    step_overhead_s: float = 0.0,
    block: int = DEFAULT_BLOCK,
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
) -> Bound:
    """The bound for `trace` (in order of arrival) on `num_devices` devices that cost what `tables` say.

    `scale` and `step_overhead_s`: every time is multiplied, then each step lengthened by so much (as `Disturbance`
    does). `time_limit_s` for each block of `block` requests. Raises InputError without scipy.
    """
    works = [
        _work(request, tables, num_devices, scale, step_overhead_s) for request in trace if request.slo_s is not None
    ]
    possible = [work for work in works if work.is_possible]
    num_met, gap = 0, 0
    for start in range(0, len(possible), block):
        met, left_open = _solve(possible[start : start + block], num_devices, time_limit_s)
        num_met, gap = num_met + met, gap + left_open
    return Bound(num_met=num_met, num_with_slo=len(works), gap=gap)


def _work(request: TraceRequest, tables: CostTables, num_devices: int, scale: float, step_overhead_s: float) -> Work:
    assert request.slo_s is not None
    profile = tables.profiles[request.model]
    cost = profile.cost(request.cost_key)
    degrees = usable_degrees(cost, legal_for(profile, request.cost_key, num_devices))
    return Work(
        arrival_s=request.arrival_s,
        deadline_s=request.arrival_s + request.slo_s + DEADLINE_TOLERANCE_S,
        encode_s=cost.aux_s["encode"] * scale,
        decode_s=cost.aux_s["decode"] * scale,
        num_steps=request.num_steps,
        hull=upper_hull([(degree, 1 / (cost.step_s(degree) * scale + step_overhead_s)) for degree in degrees]),
    )


def upper_hull(points: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Of (devices, speed), devices ascending: the corners of the least concave increasing function from (0, 0) that is
    nowhere below them, without (0, 0)."""
    hull: list[tuple[int, float]] = [(0, 0.0)]
    for n, speed in points:
        if speed <= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], (n, speed)) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append((n, speed))
    return tuple(hull[1:])


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _solve(works: Sequence[Work], num_devices: int, time_limit_s: float) -> tuple[int, int]:
    """(proven bound on how many are met, how many of these the search left open)."""
    solve, constraint, bounds = _scipy()
    program = _Program(works, num_devices)
    solution = solve(
        np.where(program.is_choice, -1.0, 0.0),
        integrality=program.is_choice.astype(int),
        bounds=bounds(0.0, np.where(program.is_choice, 1.0, np.inf)),
        constraints=constraint(program.matrix(), -np.inf, np.array(program.upper)),
        options={"time_limit": time_limit_s, "mip_rel_gap": SEARCH_GAP},
    )
    proven = solution.mip_dual_bound
    most = len(works) if proven is None or not math.isfinite(proven) else min(len(works), math.floor(1e-6 - proven))
    found = 0 if solution.x is None else round(-solution.fun)
    return most, max(0, most - found)


class _Program:
    """The program of the module's docstring for one block, all constraints as rows `Σ value · variable ≤ upper`."""

    def __init__(self, works: Sequence[Work], num_devices: int) -> None:
        self.grid = _grid(works)
        self.lengths_s = np.diff(self.grid)
        self.upper: list[float] = []
        self._entries: list[tuple[int, int, float]] = []
        self._ids = itertools.count(len(works))
        self._in_interval: list[list[tuple[int, float]]] = [[] for _ in self.lengths_s]
        for choice, work in enumerate(works):
            self._add(choice, work)
        for length_s, uses in zip(self.lengths_s.tolist(), self._in_interval, strict=True):
            self._row(uses, num_devices * length_s)
        self.is_choice = np.arange(next(self._ids)) < len(works)

    def matrix(self) -> Any:
        from scipy.sparse import csc_array

        rows, columns, values = zip(*self._entries, strict=True)
        return csc_array((values, (rows, columns)), shape=(len(self.upper), self.is_choice.size))

    def _add(self, choice: int, work: Work) -> None:
        """The variables and the rows of one request, whose x has the id `choice`."""
        busy: dict[int, list[tuple[int, float]]] = {}
        activities = (
            (work.denoise_from_s, work.denoise_until_s, work.hull, work.num_steps),
            (work.arrival_s, work.denoise_until_s, ((1, 1.0),), work.encode_s),
            (work.denoise_from_s, work.deadline_s, ((1, 1.0),), work.decode_s),
        )
        for from_s, until_s, speeds, amount in activities:
            done: list[tuple[int, float]] = [(choice, float(amount))]
            for k in self._intervals(from_s, until_s):
                for n, speed in speeds:
                    seconds = next(self._ids)
                    done.append((seconds, -speed))
                    busy.setdefault(k, []).append((seconds, 1.0))
                    self._in_interval[k].append((seconds, float(n)))
            self._row(done, 0.0)
        for k, uses in busy.items():
            self._row([*uses, (choice, -float(self.lengths_s[k]))], 0.0)

    def _intervals(self, from_s: float, until_s: float) -> Iterator[int]:
        """Intervals of a window; what it touches for less than the shortest interval is its neighbour's."""
        first = int(np.searchsorted(self.grid, from_s + SHORTEST_INTERVAL_S, "right")) - 1
        return iter(range(first, int(np.searchsorted(self.grid, until_s - SHORTEST_INTERVAL_S, "left"))))

    def _row(self, entries: Sequence[tuple[int, float]], upper: float) -> None:
        self._entries += [(len(self.upper), column, value) for column, value in entries]
        self.upper.append(upper)


def _grid(works: Sequence[Work]) -> np.ndarray:
    """The points that cut time, ascending."""
    points = sorted({p for w in works for p in (w.arrival_s, w.denoise_from_s, w.denoise_until_s, w.deadline_s)})
    kept = points[:1]
    for point in points[1:-1]:
        if point - kept[-1] >= SHORTEST_INTERVAL_S and points[-1] - point >= SHORTEST_INTERVAL_S:
            kept.append(point)
    return np.array([*kept, points[-1]])


def _scipy() -> tuple[Any, Any, Any]:
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError:
        raise InputError("bound: needs scipy; install it with pip install scipy") from None
    return milp, LinearConstraint, Bounds
