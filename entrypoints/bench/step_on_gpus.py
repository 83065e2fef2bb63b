"""`tetrion bench step` on GPUs: a step at every size and degree beside the library floor and other systems, in one run.

Owns the order of sections, the budget and the record, which is saved after every section. Each system has its own
processes; one that fails becomes rows with a null and the reason. Runs on CPU workers too, for a rehearsal.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec

from tetrion.engine.config import DeviceSpec, EngineConfig
from tetrion.engine.gpu_facts import gpu_facts
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.planning.profile import ClassCost, Profile
from tetrion.engine.probe import Probe, Size
from tetrion.engine.process_executor import ProcessExecutor
from tetrion.engine.request import GenerationError
from tetrion.entrypoints.bench.line_process import LineProcess, ProcessFailed
from tetrion.entrypoints.bench.rank_group import run_ranks
from tetrion.entrypoints.bench.step_points import (
    exactness,
    idle_gaps,
    px_of,
    resize_every_step,
    time_floor,
    time_step,
)

OURS, FLOOR = "tetrion", "floor"
OTHERS = {
    "diffusers eager": ("tetrion.entrypoints.bench.diffusers_step", False),
    "diffusers compiled": ("tetrion.entrypoints.bench.diffusers_step", True),
    "xfuser eager": ("tetrion.entrypoints.bench.xfuser_step", False),
    "xfuser compiled": ("tetrion.entrypoints.bench.xfuser_step", True),
}
"""System -> module of its ranks, and whether it compiles."""
START_S = 20.0
"""Nothing that begins with loading a model is begun with less time left."""
OUT_OF_TIME = "out of time"
MAX_INFLIGHT = 4
RESIZE_STEPS = 20
Row = dict[str, Any]


class StepOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`seconds`: how long each system is sustained at each point. `num_steps`: of the exactness report. `degrees`:
    those that are timed; resizing and exactness use all that the devices allow."""

    sizes: tuple[Size, ...]
    degrees: tuple[int, ...]
    systems: tuple[str, ...]
    num_steps: int
    seconds: float = 5.0
    budget_s: float = 3600.0
    seed: int = 1


class StepBench:
    """One run. `record` grows, and `save` is called whenever it has; `report` is told of every row."""

    def __init__(
        self,
        config: EngineConfig,
        spec: ModelSpec,
        devices: tuple[DeviceSpec, ...],
        options: StepOptions,
        record: dict[str, Any],
        save: Callable[[], None],
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._config = msgspec.structs.replace(config, max_inflight=MAX_INFLIGHT)
        self._spec, self._devices, self._options = spec, devices, options
        self._record, self._save, self._report = record, save, report
        self._until_s = time.monotonic() + options.budget_s
        self._points = [(size, degree) for size in options.sizes for degree in options.degrees]
        self._floors: dict[tuple[str, int], float | None] = {}

    def run(self) -> None:
        """All sections. First ours: the others need the memory that our workers give back."""
        if OURS in self._options.systems:
            asyncio.run(self._measure_ours())
        elif FLOOR in self._options.systems:
            asyncio.run(self._measure_floor_alone())
        for system in (name for name in self._options.systems if name in OTHERS):
            for degree in self._options.degrees:
                self._measure_other(system, degree)

    # Ours and the floor -------------------------------------------------------------------------------------------

    async def _measure_ours(self) -> None:
        executor = ProcessExecutor(self._devices, self._spec, self._config)
        try:
            await executor.start()
        except GenerationError as error:
            self._add_rows(OURS, self._points, str(error))
            return
        try:
            probe = Probe(executor, self._spec)
            await self._time_points(probe)
            await self._time_changes(probe)
        finally:
            await executor.close()

    async def _time_points(self, probe: Probe) -> None:
        floor = await self._start_floor() if FLOOR in self._options.systems else None
        reason, seconds = "not asked for", self._options.seconds
        try:
            for i, (size, degree) in enumerate(self._points):
                if self._left_s < 2 * seconds:
                    self._add_rows(OURS, self._points[i:], OUT_OF_TIME)
                    return
                try:
                    timed = await time_step(probe, size, degree, seconds, floor)
                except ProcessFailed as error:
                    reason = str(error)
                    timed = await time_step(probe, size, degree, seconds, None)
                self._add_point(size, degree, timed, reason)
        except GenerationError as error:
            self._add_rows(OURS, self._points[i:], str(error))
        finally:
            if floor is not None:
                await floor.close()

    async def _measure_floor_alone(self) -> None:
        floor = await self._start_floor()
        try:
            for size, degree in self._points:
                try:
                    ms = await time_floor(floor, self._spec, size, degree, self._options.seconds)
                except ProcessFailed as error:
                    self._add_rows(FLOOR, [(size, degree)], str(error))
                else:
                    self._floors[str(px_of(size)), degree] = ms
                    self._add(_row(FLOOR, size, degree, ms, ms))
        finally:
            await floor.close()

    async def _start_floor(self) -> LineProcess:
        config = Path(self._spec.path) / "transformer" / "config.json"
        first = self._devices[0]
        name = first.name if first.kind == "cuda" else "cpu"
        return await LineProcess.start("tetrion.entrypoints.bench.floor", str(config), name)

    def _add_point(self, size: Size, degree: int, timed: Row, reason: str) -> None:
        floor_ms = timed["floor_ms"]
        self._floors[str(px_of(size)), degree] = floor_ms
        facts = [{"sm_mhz": gpu["sm_mhz"], "temperature_c": gpu["temperature_c"]} for gpu in gpu_facts()]
        self._add(_row(OURS, size, degree, timed["ms"], floor_ms) | timed | ({"gpus": facts} if facts else {}))
        if FLOOR in self._options.systems:
            row = _row(FLOOR, size, degree, floor_ms, floor_ms)
            self._add(row if floor_ms is not None else row | {"reason": reason})

    async def _time_changes(self, probe: Probe) -> None:
        """Gaps, resizing, exactness: as far as the time allows, in this order."""
        options, size = self._options, self._usual_size()
        try:
            profile = self._profile()
            for degree in options.degrees if profile is not None else ():
                if self._left_s > 0 and profile is not None:
                    gaps = await idle_gaps(probe, self._config, profile, size, degree)
                    self._record.setdefault("idle_gaps", []).append(gaps)
                    self._save()
            await self._extend("resizing", resize_every_step(probe, size, RESIZE_STEPS))
            for each in options.sizes:
                await self._extend("exactness", exactness(probe, each, options.num_steps, options.seed))
        except GenerationError as error:
            self._record["cut_short"] = str(error)
            self._save()

    async def _extend(self, key: str, rows: AsyncIterator[Row]) -> None:
        found = self._record.setdefault(key, [])
        if self._left_s <= 0:
            self._record["cut_short"] = OUT_OF_TIME
            return
        async for row in rows:
            found.append(row)
            self._save()
            if self._left_s <= 0:
                self._record["cut_short"] = OUT_OF_TIME
                break

    def _usual_size(self) -> Size:
        usual = self._spec.default_width, self._spec.default_height
        return usual if usual in self._options.sizes else self._options.sizes[-1]

    def _profile(self) -> Profile | None:
        """The steps just timed, for the engine's own loop to plan with; None if there are none."""
        steps: dict[str, dict[int, float]] = {}
        for row in self._record["rows"]:
            if row["system"] == OURS and row["ms"] is not None:
                px = row["px"] if isinstance(row["px"], str) else f"{row['px']}x{row['px']}"
                steps.setdefault(px, {})[row["degree"]] = row["ms"]
        classes = {px: ClassCost(step_ms=ms, encode_ms=10.0, decode_ms=50.0) for px, ms in steps.items()}
        return Profile(heads=self._spec.num_heads, classes=classes) if classes else None

    # Others -------------------------------------------------------------------------------------------------------

    def _measure_other(self, system: str, degree: int) -> None:
        module, compiled = OTHERS[system]
        sizes, devices = self._options.sizes, [device.index for device in self._devices[:degree]]
        points = {str(px_of(size)): (size, degree) for size in sizes}
        if self._left_s < START_S:
            self._add_rows(system, list(points.values()), OUT_OF_TIME)
            return
        if len(set(devices)) < degree:
            self._add_rows(system, list(points.values()), f"needs {degree} devices of its own")
            return
        unit = self._spec.size_multiple
        job = {
            "transformer": str(Path(self._spec.path) / "transformer"),
            "device": self._devices[0].kind,
            "num_text": self._spec.max_text_tokens,
            "sizes": [[str(px_of(size)), size[0] // unit, size[1] // unit] for size in sizes],
            "seconds": self._options.seconds,
            "until_s": self._until_s - self._options.seconds,
            "compiled": compiled,
        }
        answers, reason = run_ranks(module, job, devices, self._left_s)
        for answer in answers:
            size, _ = points.pop(answer["name"])
            self._add(_row(system, size, degree, answer.get("ms"), self._floor_of(size, degree)) | _reason_of(answer))
        self._add_rows(system, list(points.values()), reason or OUT_OF_TIME)

    def _floor_of(self, size: Size, degree: int) -> float | None:
        return self._floors.get((str(px_of(size)), degree))

    # The record ---------------------------------------------------------------------------------------------------

    @property
    def _left_s(self) -> float:
        return self._until_s - time.monotonic()

    def _add(self, row: Row) -> None:
        self._record["rows"].append(row)
        self._save()
        self._report(f"{row['system']}, {row['px']} at degree {row['degree']}: {_number(row['ms'], 2)} ms")

    def _add_rows(self, system: str, points: list[tuple[Size, int]], reason: str) -> None:
        for size, degree in points:
            self._add(_row(system, size, degree, None, self._floor_of(size, degree)) | {"reason": reason})


def _row(system: str, size: Size, degree: int, ms: float | None, floor_ms: float | None) -> Row:
    ratio = None if ms is None or floor_ms is None else ms / floor_ms
    return {"system": system, "px": px_of(size), "degree": degree, "ms": ms, "floor_ms": floor_ms, "ratio": ratio}


def _reason_of(answer: Row) -> Row:
    return {"reason": answer["reason"]} if "reason" in answer else {}


def table(record: dict[str, Any]) -> str:
    """The record as text for people."""
    lines = [f"{'system':<20}{'px':>10}{'degree':>8}{'ms':>11}{'floor':>10}{'ratio':>8}"]
    for row in record["rows"]:
        ms, floor_ms, ratio = (
            _number(row[name], digits) for name, digits in (("ms", 2), ("floor_ms", 2), ("ratio", 3))
        )
        line = f"{row['system']:<20}{row['px']:>10}{row['degree']:>8}{ms:>11}{floor_ms:>10}{ratio:>8}"
        lines.append(f"{line}  {row['reason']}" if "reason" in row else line)
    for row in record.get("resizing", []):
        first, second = row["groups"]
        lines.append(f"a new group every step, {row['px']}: {first} ↔ {second}: {row['added_ms']:+.2f} ms a step")
    for row in record.get("idle_gaps", []):
        gap = f"{_number(row['median_ms'], 3)} ms, at most {_number(row['max_ms'], 3)} ms ({row['num_gaps']} gaps)"
        lines.append(f"idle between chunks, {row['px']} at degree {row['degree']}: median {gap}")
    differing = [row for row in record.get("exactness", []) if not row["bit_identical"]]
    for row in differing:
        lines.append(f"not exact: {row['px']}, {row['schedule']}: largest difference {row['max_difference']:.3g}")
    if record.get("exactness") and not differing:
        lines.append(f"exactness: {len(record['exactness'])} schedules gave degree 1's latents, bit for bit")
    if "cut_short" in record:
        lines.append(f"cut short: {record['cut_short']}")
    return "\n".join(lines)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
