"""The ledger of one GPU: which share of its joules went to whom. Told of readings and quanta; knows no clock.

Readings cut time into cells; they tell power, now and then the counter too. A cell's power is the mean of both ends',
or what the counter moved by where it is known at both and power is not or the cell is long. It belongs to the quanta
that ran, in proportion to what the profile says of them, or if it does not, to their times; those that ran at once
share by weight. Where none ran for a part of a cell, the GPU is taken to have drawn its idle power, which is *idle*: so
a burst shorter than a cell, or a reading that lags, is not lost to its work. Where none ran in a whole cell, power up
to the idle power is idle and what is above it *unattributed*, as is all power beside work before idle power was seen. A
window of at least `window_s` closes at a counter: then all figures are rescaled so that active + idle + unattributed is
what the counter moved by. What was before is kept beside.

    reading ──── cell ──── reading ──── cell ──── reading           counter: 1000 J ──▶ 4400 J
       |  ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒    ▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓    |           ▒ + ▓ + idle + unattributed = 3400 J
          quantum of request a     quantum of b
"""

import itertools
import math
import statistics
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec

from tetrion.engine.energy.quantum import Quantum, Share

WINDOW_S = 5.0
"""The counter moves every ~100 ms: shorter windows are unstable."""
QUIET_S = 1.0
"""After so long without work the power is the idle power."""
QUIET_CELLS = 100
COUNTED_S = 0.45
"""From this length on the counter, which moves every ~100 ms, tells more of a cell than the power at both ends."""
SHORTEST_S = 1e-9
"""Work is not shorter than clocks can tell."""
LATE_S = 0.01
"""Clocks of devices and engine may differ by so much."""
IDLE_TOLERANCE = 1.1
"""Power without work up to so many times the idle power is idle: it wavers, and drifts with the temperature."""
WINDOWS_KEPT = 64
STALE_S = 5.0
"""Of work that ended so long after the last reading nobody knows what it drew."""
FORGET_S = 600.0
"""A reading that comes so late finds the work of meanwhile forgotten."""
OVERDUE_S = 60.0
"""How much longer than asked for a window may wait for a counter."""
TOO_LATE = "readings of its time were settled before it was known"
NO_READING = f"no reading has come from its GPUs for more than {STALE_S:g} s"
WENT_BACKWARDS = "the GPU's energy counter went backwards"
STOOD_STILL = "the GPU's energy counter stood still beside power that was drawn"
NO_COUNTER = "the GPU's energy counter has not been told for too long"


Segment = tuple[float, float, list[Quantum]]
"""A stretch of time, and the quanta that ran all through it."""


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """A closed window. Joules after rescaling; `raw_`: from power samples, before. `scale`: the counter over the raw
    sum. `model_j`: what the profile says of the quanta, None if it does not know all of them."""

    start_s: float
    end_s: float
    counter_j: float
    active_j: float
    idle_j: float
    unattributed_j: float
    raw_active_j: float
    raw_idle_j: float
    raw_unattributed_j: float
    scale: float
    model_j: float | None

    @property
    def identity_error(self) -> float:
        """|active + idle + unattributed − counter| as a share of the counter."""
        gap = abs(self.active_j + self.idle_j + self.unattributed_j - self.counter_j)
        return gap / self.counter_j if self.counter_j else gap

    @property
    def raw_error(self) -> float | None:
        """By how much power samples and counter differ, as a share of the counter; None if it did not move."""
        return abs(1 / self.scale - 1) if self.scale > 0 else None


class Settled(msgspec.Struct, frozen=True, kw_only=True):
    """A closed window and its active joules by share; `window` is None, with a `reason`, where they are not known."""

    window: Window | None
    joules: Mapping[Share, float]
    reason: str = ""


class _Cell(msgspec.Struct, frozen=True, kw_only=True):
    start_s: float
    end_s: float
    watts: float
    counter_j: float | None  # at its end


class _Division(NamedTuple):
    joules: list[tuple[Share, float]]
    idle_j: float
    unattributed_j: float


class GpuLedger:
    def __init__(self, window_s: float = WINDOW_S) -> None:
        self.windows: deque[Window] = deque(maxlen=WINDOWS_KEPT)
        self._window_s = window_s
        self._cell_s = 0.0
        self._last: tuple[float, float | None, float | None] | None = None
        self._last_counter_j = -math.inf
        self._cells: deque[_Cell] = deque()
        self._quanta: list[Quantum] = []
        self._start: tuple[float, float] | None = None
        self._broken: deque[float] = deque()
        self._quiet_watts: deque[float] = deque(maxlen=QUIET_CELLS)
        self._busy_until_s = -math.inf
        self._raw: dict[Share, float] = defaultdict(float)
        self._raw_idle_j = self._raw_unattributed_j = 0.0
        self._model_j: float | None = 0.0

    @property
    def idle_w(self) -> float | None:
        """Power without work; None until it was seen."""
        return statistics.median(self._quiet_watts) if self._quiet_watts else None

    @property
    def scale(self) -> float:
        """The latest window's; 1 before there is one."""
        return self.windows[-1].scale if self.windows else 1.0

    @property
    def drift(self) -> float | None:
        """How far power samples are from the counter, as a share: twice the root mean square over the windows that are
        kept, each with the weight of its joules, so that one beside next to no work counts little. None before there is
        one."""
        errors = [(window.counter_j, window.raw_error) for window in self.windows if window.raw_error is not None]
        counter_j = math.fsum(joules for joules, _ in errors)
        return 2 * math.sqrt(math.fsum(joules * e * e for joules, e in errors) / counter_j) if counter_j else None

    def read(self, time_s: float, counter_j: float | None, watts: float | None) -> None:
        """A reading of this GPU. Readings come in order; one without news is passed over, as are all before the first
        that tells the counter."""
        if counter_j is None and (watts is None or self._last is None):
            return
        if self._last is None:
            assert counter_j is not None
            self._start = (time_s, counter_j)
            self._busy_until_s = max(self._busy_until_s, time_s)  # nobody knows what ran before
        else:
            last_s, last_j, last_w = self._last
            if time_s <= last_s:
                return
            known = [w for w in (last_w, watts) if w is not None]
            if counter_j is not None and last_j is not None and (not known or time_s - last_s >= COUNTED_S):
                known = [max(0.0, counter_j - last_j) / (time_s - last_s)]
            if counter_j is not None and counter_j < self._last_counter_j:
                self._broken.append(time_s)
            self._cell_s = time_s - last_s
            self._cells.append(_Cell(start_s=last_s, end_s=time_s, watts=sum(known) / len(known), counter_j=counter_j))
        self._last = (time_s, counter_j, watts)
        self._last_counter_j = self._last_counter_j if counter_j is None else counter_j

    def add(self, quantum: Quantum) -> str:
        """Work that has ended. Returns why what it took will not be known, as far as that is certain already."""
        unread_s = quantum.end_s - (quantum.end_s if self._last is None else self._last[0])
        if quantum.end_s - quantum.start_s > SHORTEST_S and unread_s <= FORGET_S:
            self._quanta.append(quantum)
        if unread_s > STALE_S:
            return NO_READING
        return TOO_LATE if quantum.start_s < self._settled_s - LATE_S else ""

    def settle(self, until_s: float) -> list[Settled]:
        """All work until `until_s` has been added. Returns the windows that closed."""
        closed = []
        while self._cells and self._cells[0].end_s <= until_s:
            cell = self._cells.popleft()
            self._apportion(cell)
            seconds = math.inf if self._start is None else cell.end_s - self._start[0]
            if self._broken and self._broken[0] == cell.end_s:
                self._broken.popleft()
                closed.append(self._abandon(cell, WENT_BACKWARDS))
            elif self._start is None or (cell.counter_j is None and seconds > self._window_s + OVERDUE_S):
                closed.append(self._abandon(cell, NO_COUNTER))
            elif cell.counter_j is not None and seconds >= self._window_s:
                closed.append(self._close(cell, cell.counter_j - self._start[1]))
        return closed

    def pending_j(self, request_id: str) -> dict[Share, float]:
        """What a request took since the last window closed: an estimate, with the latest window's scale. What ran after
        the last reading is taken to have drawn what the profile says, else the latest power."""
        joules: dict[Share, float] = defaultdict(float)
        ours = [quantum for quantum in self._quanta if quantum.share.request_id == request_id]
        first_s = min((quantum.start_s for quantum in ours), default=math.inf)
        divided = (self._divide(cell).joules for cell in self._cells if cell.end_s > first_s)
        for share, raw_j in itertools.chain(self._raw.items(), *divided):
            if share.request_id == request_id:
                joules[share] += raw_j * self.scale
        read_until_s, latest_w = -math.inf if self._last is None else self._last[0], self.power_w() or 0.0
        for quantum in ours:
            watts = latest_w * self.scale if quantum.model_j is None else quantum.per_second(quantum.model_j)
            joules[quantum.share] += watts * _overlap_s(quantum, read_until_s, math.inf)
        return joules

    def power_w(self) -> float | None:
        """The latest known power."""
        if self._last is not None and self._last[2] is not None:
            return self._last[2]
        return self._cells[-1].watts if self._cells else None

    def edge_j(self, resolution_s: float) -> float:
        """What the GPU takes between two readings: so uncertain is where work begins and ends."""
        return (self.power_w() or 0.0) * max(self._cell_s, resolution_s)

    @property
    def _settled_s(self) -> float:
        """Up to here everything is apportioned."""
        if self._cells:
            return self._cells[0].start_s
        return self._last[0] if self._last is not None else -math.inf

    def _apportion(self, cell: _Cell) -> None:
        """Book a cell's joules, and forget what ended before its end."""
        running = self._running(cell)
        if not running and cell.start_s - self._busy_until_s >= QUIET_S:
            self._quiet_watts.append(cell.watts)
        elif running:
            self._busy_until_s = max(quantum.end_s for quantum in running)
        division = self._divide(cell)
        for share, joules in division.joules:
            self._raw[share] += joules
        self._raw_idle_j += division.idle_j
        self._raw_unattributed_j += division.unattributed_j
        for quantum in running:
            self._count_model(quantum, _overlap_s(quantum, cell.start_s, cell.end_s))
        self._quanta = [quantum for quantum in self._quanta if quantum.end_s > cell.end_s]

    def _running(self, cell: _Cell) -> list[Quantum]:
        return [quantum for quantum in self._quanta if quantum.start_s < cell.end_s and quantum.end_s > cell.start_s]

    def _divide(self, cell: _Cell) -> "_Division":
        """A cell's joules between those that ran in it, idle and unattributed."""
        segments = _segments(self._running(cell), cell.start_s, cell.end_s)
        covered_s = math.fsum(end_s - start_s for start_s, end_s, _ in segments)
        free_s = max(0.0, cell.end_s - cell.start_s - covered_s)
        idle_w, idle_j, unattributed_j = self.idle_w, 0.0, 0.0
        work_j = cell.watts * covered_s
        if idle_w is None:
            unattributed_j = cell.watts * free_s
        elif segments:
            all_j = cell.watts * (covered_s + free_s)
            idle_j = min(all_j, idle_w * free_s)
            work_j = all_j - idle_j
        else:
            idle_j = min(cell.watts, IDLE_TOLERANCE * idle_w) * free_s
            unattributed_j = cell.watts * free_s - idle_j
        return _Division([(share, work_j * part) for share, part in _parts(segments)], idle_j, unattributed_j)

    def _count_model(self, quantum: Quantum, seconds: float) -> None:
        if quantum.model_j is None:
            self._model_j = None
        elif self._model_j is not None:
            self._model_j += quantum.per_second(quantum.model_j) * seconds

    def _close(self, cell: _Cell, counter_j: float) -> Settled:
        """The window that ends with `cell`, in which the counter moved by `counter_j`."""
        assert self._start is not None
        raw_active_j = math.fsum(self._raw.values())
        raw_j = math.fsum((raw_active_j, self._raw_idle_j, self._raw_unattributed_j))
        if raw_j > 0 and not counter_j:
            return self._abandon(cell, STOOD_STILL)
        scale = counter_j / raw_j if raw_j > 0 else 0.0
        joules = {share: value * scale for share, value in self._raw.items()}
        active_j, idle_j = math.fsum(joules.values()), self._raw_idle_j * scale
        window = Window(
            start_s=self._start[0],
            end_s=cell.end_s,
            counter_j=counter_j,
            active_j=active_j,
            idle_j=idle_j,
            # Where no power was seen at all, what the counter says belongs to nobody.
            unattributed_j=self._raw_unattributed_j * scale if raw_j > 0 else counter_j,
            raw_active_j=raw_active_j,
            raw_idle_j=self._raw_idle_j,
            raw_unattributed_j=self._raw_unattributed_j,
            scale=scale if raw_j > 0 else 1.0,
            model_j=self._model_j,
        )
        self.windows.append(window)
        self._begin(cell.end_s, cell.counter_j)
        return Settled(window=window, joules=joules)

    def _abandon(self, cell: _Cell, reason: str) -> Settled:
        """Nobody knows what the counter moved by in the window that ends with `cell`."""
        joules = dict(self._raw)
        self._begin(cell.end_s, cell.counter_j)
        return Settled(window=None, joules=joules, reason=reason)

    def _begin(self, start_s: float, start_j: float | None) -> None:
        """A window, or none until a cell ends with a counter."""
        self._start = None if start_j is None else (start_s, start_j)
        self._raw.clear()
        self._raw_idle_j = self._raw_unattributed_j = 0.0
        self._model_j = 0.0


def _parts(segments: list[Segment]) -> Iterator[tuple[Share, float]]:
    """How a cell's joules of work are divided; parts add up to 1."""
    claims = [
        (quantum.share, quantum.per_second(quantum.model_j) * (end_s - start_s))
        for start_s, end_s, sharers in segments
        for quantum in sharers
        if quantum.model_j is not None
    ]
    total = math.fsum(claim for _, claim in claims)
    if total <= 0 or len(claims) < sum(len(sharers) for _, _, sharers in segments):
        claims = [claim for segment in segments for claim in _claims_by_time(segment)]
        total = math.fsum(claim for _, claim in claims)
    return ((share, claim / total) for share, claim in claims)


def _claims_by_time(segment: Segment) -> Iterator[tuple[Share, float]]:
    start_s, end_s, sharers = segment
    total = math.fsum(quantum.per_second(quantum.weight) for quantum in sharers)
    for quantum in sharers:
        part = quantum.per_second(quantum.weight) / total if total else 1 / len(sharers)
        yield quantum.share, (end_s - start_s) * part


def _segments(quanta: list[Quantum], start_s: float, end_s: float) -> list[Segment]:
    """The stretches of a cell with the same quanta running, those with none left out."""
    cuts = {start_s, end_s}
    for quantum in quanta:
        cuts |= {max(start_s, quantum.start_s), min(end_s, quantum.end_s)}
    ordered = sorted(cuts)
    found = []
    for low, high in itertools.pairwise(ordered):
        sharers = [quantum for quantum in quanta if quantum.start_s <= low and quantum.end_s >= high]
        if sharers:
            found.append((low, high, sharers))
    return found


def _overlap_s(quantum: Quantum, start_s: float, end_s: float) -> float:
    return max(0.0, min(quantum.end_s, end_s) - max(quantum.start_s, start_s))
