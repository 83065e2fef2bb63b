"""The folder of a live proof, which many calls fill: what all runs have in common, and the runs that are there.

    setup.json              `Setup`: how the first call began it; base SLOs; the points with their traces
    profile.json            the cost table after the first call's warm-up: SLOs, loads and compression follow from it,
                            and the engine of every later call starts with it
    slo-live-N-MIX.jsonl    recordings, in the order of the runs

Decides which runs are left and whether one more may be begun; starts no engine.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.proof.recorded_system import is_recorded
from tetrion.engine.planning.cost.profile import Profile, read_profile
from tetrion.entrypoints.bench.recording import Recording, read_recordings, write_recordings
from tetrion.entrypoints.bench.simulation import simulate
from tetrion.entrypoints.bench.slo_points import Point
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.record import write_whole

MARGIN, MARGIN_S = 1.1, 5.0
"""A run is given its time in simulation times the one plus the other, for what simulation does not know."""


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What every call has in common. `options`: of the command; `machine`: model, devices, commit, …; `host`: of the
    first call; `points` of all mixes, heavier loads first; `base_slo_s`: before compression."""

    options: dict[str, Any]
    machine: dict[str, Any]
    host: dict[str, Any]
    num_devices: int
    base_slo_s: dict[str, float]
    points: tuple[Point, ...]


class ProofFolder:
    def __init__(self, path: Path) -> None:
        """Raises InputError for a folder with recordings of which nothing says how they were made."""
        self.path = path
        self.profile_path = path / "profile.json"
        self._setup_path = path / "setup.json"
        self.setup = self._read_setup()
        if self.setup is None and (found := sorted(path.glob("slo-live-*.jsonl"))):
            raise InputError(f"folder: {found[0]} has recordings but there is no setup.json; choose another folder")

    def begin(self, setup: Setup, profile: Profile) -> None:
        """The first call's; `setup.json` last, since it is what says that the folder was begun."""
        for path, value in ((self.profile_path, profile), (self._setup_path, setup)):
            write_whole(path, msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")
        self.setup = setup

    @property
    def profile(self) -> Profile:
        return read_profile(self.profile_path)

    def file(self, mix: str, suffix: str) -> Path:
        assert self.setup is not None
        return self.path / f"slo-live-{self.setup.num_devices}-{mix}{suffix}"

    def recordings(self, mix: str) -> tuple[Recording, ...]:
        path = self.file(mix, ".jsonl")
        return read_recordings(path) if path.exists() else ()

    def add(self, mix: str, recordings: Sequence[Recording]) -> None:
        write_recordings(self.file(mix, ".jsonl"), (*self.recordings(mix), *recordings))

    def left(self, mixes: Sequence[str], policies: Sequence[str]) -> Iterator[tuple[Point, str]]:
        """The runs that are not there, mix by mix, point by point; all policies of a point in turn."""
        for mix in mixes:
            recordings = self.recordings(mix)
            for point in self.setup.points if self.setup else ():
                if point.mix == mix:
                    yield from ((point, name) for name in policies if not is_recorded(recordings, point, name))

    def _read_setup(self) -> Setup | None:
        try:
            return msgspec.json.decode(self._setup_path.read_bytes(), type=Setup)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            raise InputError(f"{self._setup_path}: not the setup of a proof: {error}") from None


def refuse_to_mix(folder: Path, begun: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises InputError naming everything in which `now` differs from how the folder was begun."""
    differing = [
        f"{key}: {begun.get(key)!r} there, {now.get(key)!r} now"
        for key in {**begun, **now}
        if begun.get(key) != now.get(key)
    ]
    if differing:
        raise InputError(
            f"folder: {folder} was begun otherwise and runs are not mixed ({'; '.join(differing)}); "
            "choose another folder"
        )


def run_s(folder: ProofFolder, point: Point, policy: str) -> float:
    """Seconds to allow for a run: arrivals, and what is left to do once the last is there."""
    setup, profile = folder.setup, folder.profile
    assert setup is not None
    limit = setup.machine["max_inflight"]
    ends_s = [
        simulate(trace, profile=profile, policy=policy, num_devices=setup.num_devices, max_inflight=limit).end_s
        for _, trace in point.traces
    ]
    return sum(MARGIN * end_s + MARGIN_S for end_s in ends_s)


class Budget:
    """What is left of `limit_s` seconds (None: no limit) since it was made."""

    def __init__(self, limit_s: float | None, now_s: Callable[[], float] = time.monotonic) -> None:
        self._limit_s, self._now_s, self._start_s = limit_s, now_s, now_s()

    @property
    def left_s(self) -> float:
        return float("inf") if self._limit_s is None else self._limit_s - (self._now_s() - self._start_s)
