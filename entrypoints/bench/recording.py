"""A run as it happened: its trace, every command with its members and times, its outcomes. In and out of JSONL files.

`Recorder` sits between an engine loop and its executor, real or in virtual time, and writes down what passes. Times are
seconds from the start of the trace. A file has one `Recording` a line.
"""

import gzip
import time
import zlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tetrion.engine.executors.base import Executor, Happening, PictureReady, WorkerLost, WorkerReady
from tetrion.engine.loop.statistics import LoopFigures
from tetrion.engine.messages import (
    BarriersReset,
    Command,
    Decoded,
    Denoise,
    Denoised,
    Encoded,
    Event,
    Failed,
    LatentsCopied,
    Loaded,
    PeersMapped,
    Pong,
    StageCommand,
    Started,
)
from tetrion.engine.planning.cost.profile import Profile
from tetrion.engine.planning.snapshot import Planner, RoundPlan, Snapshot
from tetrion.entrypoints.bench.outcomes import Chunk, Mode, Outcome, Run
from tetrion.entrypoints.bench.workloads import Trace, TraceRequest
from tetrion.entrypoints.record import write_whole

GZIP = b"\x1f\x8b"
Heard = Event | WorkerLost | WorkerReady
"""What a recorder keeps of what an executor reports."""


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """One run of one policy on one trace, whose requests are those of `run.outcomes`. `profile`: the cost table that
    the policy had at the end of it. `facts`: what else was recorded of where and how it ran."""

    policy: str
    mode: Mode
    mix: str
    rate_per_min: float | None
    slo_scale: float
    seed: int
    profile: Profile
    run: Run
    chunks: tuple[Chunk, ...]
    facts: dict[str, Any] = {}

    @property
    def trace(self) -> Trace:
        return tuple(outcome.request for outcome in self.run.outcomes)


def write_recordings(path: Path, recordings: Sequence[Recording]) -> None:
    """The whole of it or nothing."""
    write_whole(path, b"".join(msgspec.json.encode(recording) + b"\n" for recording in recordings))


def read_recordings(path: Path) -> tuple[Recording, ...]:
    """Of a file that may be compressed with gzip. Raises ValueError naming file and line, or OSError."""
    recordings, data = [], path.read_bytes()
    if data.startswith(GZIP):
        try:
            data = gzip.decompress(data)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: not a recording: {error}") from None
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            try:
                recordings.append(msgspec.json.decode(line, type=Recording, strict=False))
            except msgspec.DecodeError as error:
                raise ValueError(f"{path}: line {number}: not a recording: {error}") from None
    if not recordings:
        raise ValueError(f"{path}: has no recording")
    return tuple(recordings)


class _Sent(NamedTuple):
    command: Command
    members: tuple[int, ...]
    time_s: float


class _Told(NamedTuple):
    event: Heard
    time_s: float


class Recorder:
    """Writes down what one loop does. An engine's instrument (see `AsyncEngine`): give it to the engine, `start` it at
    the beginning of each trace and read `chunks` and `decision_s` at its end. Requests are known by their number, which
    is their id; commands of others (a warm-up) are not recorded. What passes is only kept until somebody asks for the
    chunks: the loop's own time is measured, too."""

    def __init__(self) -> None:
        self.planner: Planner | None = None
        """Set: takes the place of the engine's own policy from the next decision on."""
        self.now_s: Callable[[], float] = time.monotonic
        """The clock of the executor it sits at, once there is one."""
        self._heard: list[_Sent | _Told] = []
        self.start(0.0)

    def start(self, zero_s: float) -> None:
        """Forget everything; `zero_s` on the executor's clock is the start of the trace."""
        self._zero_s = zero_s
        self._last_end_s: dict[int, float] = {}
        self._heard.clear()
        self._open: dict[int, _OpenChunk] = {}
        self._chunks: list[Chunk] = []
        self.decision_s: list[float] = []

    @property
    def chunks(self) -> list[Chunk]:
        """Of the commands that all members have answered, in the order of the last answers."""
        for heard in self._heard:
            if isinstance(heard, _Sent):
                self._on_command(*heard)
            else:
                self._on_event(*heard)
        self._heard.clear()
        return self._chunks

    def wrap_executor(self, executor: Executor) -> Executor:
        """`executor`, with its commands and events recorded."""
        self.now_s = executor.now_s
        return _RecordedExecutor(executor, self._heard)

    def wrap_planner(self, planner: Planner) -> Planner:
        """`planner`, or the one that was set, with the time of each decision recorded."""

        def plan(snapshot: Snapshot) -> RoundPlan:
            start_s = time.perf_counter()
            made = (self.planner or planner)(snapshot)
            self.decision_s.append(time.perf_counter() - start_s)
            return made

        return plan

    def run(
        self,
        trace: Sequence[TraceRequest],
        finished: Sequence[tuple[float | None, tuple[int, ...]]],
        *,
        num_devices: int,
        end_s: float,
        max_lag_s: float = 0.0,
        loop: LoopFigures,
        refused: Collection[int] = (),
    ) -> Run:
        """What was recorded, as the run of `trace`. `finished`: of each request its time (None: it failed) and the
        degrees of its steps. `refused`: the numbers of those that admission refused."""
        spent_s = [0.0] * len(trace)
        for chunk in self.chunks:
            spent_s[chunk.request] += chunk.busy_s
        return Run(
            outcomes=tuple(
                Outcome(request=request, finished_s=time_s, gpu_s=gpu_s, degrees=degrees, refused=number in refused)
                for number, (request, (time_s, degrees), gpu_s) in enumerate(zip(trace, finished, spent_s, strict=True))
            ),
            num_devices=num_devices,
            end_s=end_s,
            decision_s=tuple(self.decision_s),
            max_lag_s=max_lag_s,
            loop=loop,
            zero_s=self._zero_s,
        )

    def _on_command(self, command: Command, members: tuple[int, ...], now_s: float) -> None:
        if isinstance(command, StageCommand) and command.request_id.isdecimal():
            self._open[command.command_id] = _OpenChunk(command, members, now_s)

    def _on_event(self, event: Heard, now_s: float) -> None:
        match event:
            case Denoised():
                self._close(event.command_id, event.device_id, event.started_s, event.ended_s, event.waited_s)
            case Encoded() | Decoded():
                self._close(event.command_id, event.device_id, event.started_s, event.ended_s)
            case Failed():
                self._fail(event.command_id, event.device_id, now_s)
            case WorkerLost():
                for command_id in [c for c, chunk in self._open.items() if event.device_id in chunk.pending]:
                    self._fail(command_id, event.device_id, now_s)
            case Started() | Loaded() | PeersMapped() | LatentsCopied() | BarriersReset() | Pong() | WorkerReady():
                pass  # of no command of a request

    def _fail(self, command_id: int, device_id: int, now_s: float) -> None:
        """The member brings no result. It is taken to have been busy since the command could have begun."""
        chunk = self._open.get(command_id)
        if chunk is not None:
            chunk.failed = True
            started_s = min(now_s, max(chunk.submitted_s, self._last_end_s.get(device_id, self._zero_s)))
            self._close(command_id, device_id, started_s, now_s)

    def _close(self, command_id: int, device_id: int, started_s: float, ended_s: float, waited_s: float = 0.0) -> None:
        """A member of the command is done with it; the last one makes it a `Chunk`. Times are the executor's."""
        chunk = self._open.get(command_id)
        if chunk is None:
            return
        self._last_end_s[device_id] = ended_s
        chunk.times.append((started_s, ended_s, waited_s))
        chunk.pending.discard(device_id)
        if not chunk.pending:
            del self._open[command_id]
            self._chunks.append(chunk.closed(self._zero_s))


class _OpenChunk:
    """A command that members have yet to answer. `times`: (started, ended, waited) of those that have, on the clock of
    the executor."""

    def __init__(self, command: StageCommand, members: tuple[int, ...], submitted_s: float) -> None:
        self.command = command
        self.submitted_s = submitted_s
        self.failed = False
        self.members = members
        self.pending = set(members)
        self.times: list[tuple[float, float, float]] = []

    def closed(self, zero_s: float) -> Chunk:
        command = self.command
        starts_s, ends_s = [times[0] - zero_s for times in self.times], [times[1] - zero_s for times in self.times]
        busy_s = [end_s - start_s for start_s, end_s in zip(starts_s, ends_s, strict=True)]
        steps = (command.step_index, command.chunk_steps) if isinstance(command, Denoise) else (0, 0)
        return Chunk(
            request=int(command.request_id),
            stage=command.stage,
            members=self.members,
            start_s=min(starts_s),
            joined_s=max(starts_s),
            end_s=max(ends_s),
            net_s=max([spent_s - times[2] for spent_s, times in zip(busy_s, self.times, strict=True)]),
            busy_s=sum(busy_s),
            step_index=steps[0],
            chunk_steps=steps[1],
            failed=self.failed,
        )


class _RecordedExecutor:
    """An executor that keeps its commands and events in `heard`; everything else goes straight through, at no cost
    where the loop asks many times a tick."""

    def __init__(self, executor: Executor, heard: list[_Sent | _Told]) -> None:
        self._executor = executor
        self._heard = heard
        self.device_ids = executor.device_ids
        self.stages = executor.stages
        self.first_time_s = executor.first_time_s
        self.now_s = executor.now_s
        self.wait = executor.wait
        self.wake = executor.wake
        self.abort = executor.abort
        self.kill = executor.kill
        self.revive = executor.revive
        self.read_saved = executor.read_saved
        self.write_saved = executor.write_saved
        self.put_pictures = executor.put_pictures
        self.release_input_slot = executor.release_input_slot
        self.acquire_image_slot = executor.acquire_image_slot
        self.release_image_slot = executor.release_image_slot
        self.take_image = executor.take_image

    @property
    def alive(self) -> frozenset[int]:
        return self._executor.alive

    @property
    def occupied(self) -> frozenset[int]:
        return self._executor.occupied

    def submit(self, command: Command, members: tuple[int, ...]) -> bool:
        taken = self._executor.submit(command, members)
        if taken:
            self._heard.append(_Sent(command, members, self.now_s()))
        return taken

    def poll(self) -> list[Happening]:
        events, now_s = self._executor.poll(), self.now_s()
        self._heard += [_Told(event, now_s) for event in events if not isinstance(event, PictureReady)]
        return events
