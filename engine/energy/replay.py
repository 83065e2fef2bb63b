"""The `replay` meter: recorded readings, one JSON object a line, given again in their order. For tests without a GPU.

A line is a `Reading`: `{"time_s": 0.0, "joules": {"GPU-a": 100.0}, "watts": {"GPU-a": 350.0}}`.
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from tetrion.engine.energy.meter import MeterUnavailable, Reading

RESOLUTION_S = 0.1


class ReplayMeter:
    """Gives `readings` one by one; after the last, readings without figures at its time."""

    source = "replay"
    resolution_s = RESOLUTION_S
    reason = ""

    def __init__(self, readings: Iterable[Reading]) -> None:
        """Raises MeterUnavailable if there is none."""
        recorded = list(readings)
        if not recorded:
            raise MeterUnavailable("the recording has no reading")
        self.uuids = tuple(dict.fromkeys(itertools.chain.from_iterable(reading.joules for reading in recorded)))
        self._last_s = recorded[-1].time_s
        self._left: Iterator[Reading] = iter(recorded)

    def read(self, counters: bool = True) -> Reading:
        return next(self._left, Reading(time_s=self._last_s, joules={}, watts={}))

    def close(self) -> None:
        self._left = iter(())


def read_recording(path: Path) -> ReplayMeter:
    """Raises MeterUnavailable naming file and line."""
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
    return ReplayMeter(readings)
