"""Runs that were recorded, as a system: rows of them are made as they are of runs that take place."""

from collections.abc import Sequence
from typing import Any

from tetrion.engine.planning.cost.tables import only_table
from tetrion.entrypoints.bench.outcomes import Chunk, Mode, Run
from tetrion.entrypoints.bench.recording import Recording
from tetrion.entrypoints.bench.slo_points import Point
from tetrion.entrypoints.bench.workloads import Trace


class RecordedSystem:
    """Answers with what `recordings` (at least one, all of one system) hold."""

    def __init__(self, recordings: Sequence[Recording]) -> None:
        self._recordings = recordings
        self.mode: Mode = recordings[0].mode
        self.num_devices = recordings[0].run.num_devices
        self.tables = only_table(recordings[0].profile)
        self.facts: dict[str, Any] = recordings[0].facts

    def run(self, trace: Trace, policy: str, seed: int) -> tuple[Run, tuple[Chunk, ...]]:
        """The recorded run of this very trace. Raises LookupError if there is none."""
        found = find_recording(self._recordings, trace, policy, seed)
        if found is None:
            raise LookupError(f"no recording of {policy} on this trace (seed {seed})")
        return found.run, found.chunks


def find_recording(recordings: Sequence[Recording], trace: Trace, policy: str, seed: int) -> Recording | None:
    matching = (r for r in recordings if (r.policy, r.seed) == (policy, seed) and r.trace == trace)
    return next(matching, None)


def is_recorded(recordings: Sequence[Recording], point: Point, policy: str) -> bool:
    """Whether `policy` ran every trace of `point`."""
    return all(find_recording(recordings, trace, policy, seed) is not None for seed, trace in point.traces)


def recorded_policies(recordings: Sequence[Recording], point: Point) -> tuple[str, ...]:
    """Those that ran every trace of `point`, in the order in which they did."""
    return tuple(p for p in dict.fromkeys(r.policy for r in recordings) if is_recorded(recordings, point, p))
