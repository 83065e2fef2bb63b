"""`python -m benchmarks.research replay`: recorded runs again in virtual time, and how well the two agree.

The same arrivals, policy and number of devices; every stage costs what it took on average in the recorded run, plus
what a chunk cost beyond its steps. A simulation that agrees may be believed about workloads that were not run.

On a machine that others use too, speed drifts while a run lasts. With `drift` the simulated devices drift with it.

A step that ends a millisecond earlier or later may send what follows another way. With more `seeds` than one, so many
runs, each of whose commands takes what some recorded one of its size and stage took, say what is to be expected
(means), and within what range.

TetriServe's rounds lie on a grid of the clock, and where arrivals fall in it counts. A replay begins where the recorded
run did; if that was not recorded, replays with a seed begin anywhere.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tetrion.engine.messages import Command, Denoise, StageCommand
from tetrion.engine.planning.cost.predict import predict_s
from tetrion.engine.planning.cost.profile import ClassCost, Profile, read_profile
from tetrion.engine.planning.cost.tables import CostTables
from tetrion.engine.shape import cost_key_of_size
from tetrion.engine.stages import Stage
from tetrion.entrypoints.bench.outcomes import Chunk, Run
from tetrion.entrypoints.bench.recording import Recorder, Recording, read_recordings
from tetrion.entrypoints.bench.simulation import MAX_INFLIGHT, simulate
from tetrion.entrypoints.bench.slo_statistics import Row, attainment
from tetrion.entrypoints.bench.workloads import Size
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.record import check_writable, make_record, write_record

DRIFT_WINDOW_S = 3.0
LATEST_START_S = 10.0
"""On the clock, of replays of a run that began nobody knows when: many times TetriServe's rounds."""


def command(
    *,
    recordings: Path,
    profile: Path | None = None,
    drift: bool = False,
    seeds: int = 1,
    output: Path | None = None,
    as_json: bool = False,
    command_line: str = "python -m benchmarks.research replay",
) -> dict[str, Any]:
    """What `python -m benchmarks.research replay` does: a line for each recorded run (or one JSON object), written to
    `output` too.

    Raises InputError for what the caller can put right.
    """
    check_writable(output, "output")
    try:
        recorded = read_recordings(recordings)
        table = None if profile is None else read_profile(profile)
    except ValueError as error:
        raise InputError(str(error)) from None
    rows = [agreement(recording, replays(recording, table, drift=drift, seeds=seeds)) for recording in recorded]
    made = make_record(command_line, rows)
    text = write_record(made, output)
    print(text if as_json else "\n".join(map(_line, rows)))
    return made


def replays(
    recording: Recording, profile: Profile | None = None, *, drift: bool = False, seeds: int = 1
) -> tuple[Run, ...]:
    """The recorded trace and policy in virtual time: once on mean times, or so often on times drawn from the recorded
    ones. Commands take what `profile` says, or what the recorded run measured; the policy plans with `profile` or the
    table that it had then. `drift`: times also follow how the recorded ones deviated from that, in windows of
    `DRIFT_WINDOW_S`."""
    replayer = _Replayer(recording, profile, drift)
    return tuple(map(replayer.run, range(seeds))) if seeds > 1 else (replayer.run(None),)


class _Replayer:
    """What all replays of a recording share is worked out once."""

    def __init__(self, recording: Recording, profile: Profile | None, drift: bool) -> None:
        self._recording = recording
        self._planned = profile or recording.profile
        self._table = profile or measured_profile(recording)
        self._costs = CostTables(profiles={"": self._table})
        self._overhead_s = chunk_overhead_s(recording.chunks) if recording.mode == "live" else 0.0
        self._slowdown = drift_of(recording, self._table) if drift else lambda _: 1.0
        self._spread = spread_of(recording)

    def run(self, seed: int | None) -> Run:
        """`seed`: of the times that are drawn from the recorded ones, and of the start on the clock where it is not
        known; None: their mean, and zero."""
        recording, recorder, draw = self._recording, Recorder(), random.Random(seed)
        start_s = recording.run.zero_s
        if start_s is None:
            start_s = 0.0 if seed is None else draw.uniform(0.0, LATEST_START_S)
        trace = [msgspec.structs.replace(request, arrival_s=start_s + request.arrival_s) for request in recording.trace]
        spread = {} if seed is None else self._spread

        def duration(command: Command, _: float) -> float:
            assert isinstance(command, StageCommand)
            shape = command.params.shape
            ratios = spread.get((shape.size, command.stage), [1.0])
            seconds = predict_s(command, self._costs) * draw.choice(ratios) * self._slowdown(recorder.now_s() - start_s)
            return seconds + (self._overhead_s if isinstance(command, Denoise) else 0.0)

        return simulate(
            trace,
            profile=self._planned,
            policy=recording.policy,
            num_devices=recording.run.num_devices,
            duration=duration,
            recorder=recorder,
            max_inflight=recording.facts.get("max_inflight", MAX_INFLIGHT),
        )


def measured_profile(recording: Recording) -> Profile:
    """The recording's profile with the mean of every time that the run measured in place of what it says."""
    times: dict[tuple[tuple[int, int], str | int], list[tuple[float, int]]] = {}
    for chunk in recording.chunks:
        if not chunk.failed:
            request = recording.run.outcomes[chunk.request].request
            what = len(chunk.members) if chunk.stage == "denoise" else chunk.stage
            times.setdefault(((request.width, request.height), what), []).append((chunk.net_s, chunk.chunk_steps or 1))
    mean_ms = {key: 1e3 * sum(s for s, _ in got) / sum(n for _, n in got) for key, got in times.items()}
    classes = dict(recording.profile.classes)
    for size in {size for size, _ in mean_ms}:
        classes[cost_key_of_size(size)] = _measured_class(recording.profile, size, mean_ms)
    return msgspec.structs.replace(recording.profile, classes=classes)


def _measured_class(
    profile: Profile, size: tuple[int, int], mean_ms: dict[tuple[tuple[int, int], str | int], float]
) -> ClassCost:
    known = profile.cost(cost_key_of_size(size))
    return ClassCost.of(
        {degree: mean_ms.get((size, degree), 1e3 * step_s) for degree, step_s in known.step_by_degree_s.items()},
        {stage: mean_ms.get((size, stage), 1e3 * aux_s) for stage, aux_s in known.aux_s.items()},
        {},
        {},
    )


def spread_of(recording: Recording) -> dict[tuple[Size, Stage], list[float]]:
    """What each command of a size and stage took, over the mean of those on so many devices."""
    ratios: dict[tuple[Size, Stage], list[float]] = {}
    for chunk, net_s, said_s in _times(recording, measured_profile(recording)):
        request = recording.run.outcomes[chunk.request].request
        ratios.setdefault(((request.width, request.height), chunk.stage), []).append(net_s / said_s)
    return ratios


def _times(recording: Recording, profile: Profile) -> Iterator[tuple[Chunk, float, float]]:
    """Each command that brought a result, what it took, and what `profile` says."""
    for chunk in recording.chunks:
        request = recording.run.outcomes[chunk.request].request
        cost = profile.cost(request.cost_key)
        said_s = cost.aux_s.get(chunk.stage) or chunk.chunk_steps * cost.step_s(len(chunk.members))
        if not chunk.failed:
            yield chunk, chunk.net_s, said_s


def chunk_overhead_s(chunks: tuple[Chunk, ...]) -> float:
    """What chunks took on average beyond their steps, once all members were there: entry barrier and pull of state."""
    beyond_s = [max(0.0, c.end_s - c.joined_s - c.net_s) for c in chunks if c.stage == "denoise" and not c.failed]
    return float(np.mean(beyond_s)) if beyond_s else 0.0


def drift_of(recording: Recording, profile: Profile) -> Callable[[float], float]:
    """Time -> how many times what `profile` says stages took then; where nothing ran, as in the window before."""
    took: dict[int, list[tuple[float, float]]] = {}
    for chunk, net_s, said_s in _times(recording, profile):
        took.setdefault(int(chunk.start_s // DRIFT_WINDOW_S), []).append((net_s, said_s))
    ratios, last = [], 1.0
    for window in range(max(took, default=0) + 1):
        if window in took:
            last = sum(net_s for net_s, _ in took[window]) / sum(said_s for _, said_s in took[window])
        ratios.append(last)
    return lambda time_s: ratios[min(int(time_s // DRIFT_WINDOW_S), len(ratios) - 1)]


def agreement(recording: Recording, simulated: Sequence[Run]) -> Row:
    """Recorded beside simulated (the mean of all runs, with their range if there are several): attainment (difference:
    simulated − recorded) and latency (ratio: simulated / recorded)."""
    row: Row = {
        "policy": recording.policy,
        "recorded_mode": recording.mode,
        "devices": recording.run.num_devices,
        "mix": recording.mix,
        "rate_per_min": recording.rate_per_min,
        "slo_scale": recording.slo_scale,
        "seed": recording.seed,
        "requests": len(recording.run.outcomes),
        "simulated_runs": len(simulated),
    }
    real = attainment(recording.run.outcomes)
    row["attainment"] = _beside(real, [attainment(run.outcomes) for run in simulated])
    ours = row["attainment"]["simulated"]
    row["attainment_difference"] = None if real is None or ours is None else ours - real
    for name, statistic in (("mean", np.mean), ("p95", _p95)):
        row[f"{name}_s"] = _beside(_latency(recording.run, statistic), [_latency(run, statistic) for run in simulated])
        real_s, ours_s = row[f"{name}_s"]["recorded"], row[f"{name}_s"]["simulated"]
        row[f"{name}_ratio"] = ours_s / real_s if real_s and ours_s else None
    return row


def _beside(recorded: float | None, simulated: Sequence[float | None]) -> dict[str, Any]:
    known = [value for value in simulated if value is not None]
    beside: dict[str, Any] = {"recorded": recorded, "simulated": float(np.mean(known)) if known else None}
    return beside | ({"range": [min(known), max(known)]} if len(known) > 1 else {})


def _latency(run: Run, statistic: Callable[[list[float]], Any]) -> float | None:
    latencies_s = [outcome.latency_s for outcome in run.outcomes if outcome.latency_s is not None]
    return float(statistic(latencies_s)) if latencies_s else None


def _p95(values: list[float]) -> Any:
    return np.percentile(values, 95)


def _line(row: Row) -> str:
    words = [f"{row['policy']:22} {row['mix']:10} SLO ×{row['slo_scale']:<5g} {row['requests']:5} requests"]
    if row["attainment_difference"] is not None:
        shares = row["attainment"]
        difference = 100 * row["attainment_difference"]
        words.append(f"attainment {shares['recorded']:.3f} → {shares['simulated']:.3f} ({difference:+.1f} points)")
        if "range" in shares:
            words.append("[{:.3f} – {:.3f}]".format(*shares["range"]))
    for name in ("mean", "p95"):
        if row[f"{name}_ratio"] is not None:
            seconds = row[f"{name}_s"]
            ratio = row[f"{name}_ratio"]
            words.append(f"{name} {seconds['recorded']:.3f} → {seconds['simulated']:.3f} s (×{ratio:.3f})")
    return "  ".join(words)
