"""The `replay` meter: recorded readings, one JSON object a line, given again. For tests and trials without a GPU.

A line is a `Reading`: `{"time_s": 0.0, "joules": {"GPU-a": 100.0}, "watts": {"GPU-a": 350.0}}`.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from tetrion.engine.energy.meters.base import MeterUnavailable, Reading

RESOLUTION_S = 0.1


class ReplayMeter:
    """Gives `readings` one by one, at their own times; after the last, readings without figures at its time.

    With a clock it keeps step: the first is of the moment at which it is asked for, and later ones are given when as
    much time has passed as had then, of several that are due only the latest (the latest with joules, if any has some).
    """

    source = "replay"
    resolution_s = RESOLUTION_S
    reason = ""

    def __init__(self, readings: Iterable[Reading], clock: Callable[[], float] | None = None) -> None:
        """Raises MeterUnavailable if there is none."""
        self._left = deque(readings)
        if not self._left:
            raise MeterUnavailable("the recording has no reading")
        self.uuids = tuple(dict.fromkeys(itertools.chain.from_iterable(reading.joules for reading in self._left)))
        self._clock = clock
        self._shift_s: float | None = None if clock else 0.0
        self._last_s = self._left[0].time_s

    def read(self, counters: bool = True) -> Reading:
        due = self._due()
        told = next((reading for reading in reversed(due) if reading.joules), due[-1] if due else None)
        shift_s = self._shift_s or 0.0
        if told is None:
            return Reading(time_s=self._last_s + shift_s, joules={}, watts={})
        self._last_s = told.time_s
        return msgspec.structs.replace(told, time_s=told.time_s + shift_s)

    def close(self) -> None:
        self._left.clear()

    def _due(self) -> list[Reading]:
        if self._clock is None:
            return [self._left.popleft()] if self._left else []
        now_s = self._clock()
        if self._shift_s is None:
            self._shift_s = now_s - self._last_s
        due = []
        while self._left and self._left[0].time_s + self._shift_s <= now_s:
            due.append(self._left.popleft())
        return due


def read_recording(path: Path) -> ReplayMeter:
    """In step with CLOCK_MONOTONIC. Raises MeterUnavailable naming file and line."""
    readings = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise MeterUnavailable(f"cannot read {str(path)!r}: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                readings.append(msgspec.json.decode(line, type=Reading))
            except msgspec.DecodeError as error:
                raise MeterUnavailable(f"{path}: line {number}: not a reading: {error}") from None
    return ReplayMeter(readings, time.monotonic)
