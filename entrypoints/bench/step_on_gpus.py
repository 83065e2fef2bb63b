"""`tetrion bench step` on GPUs: a step at every size and degree beside the library floor and other systems, in one run.

Owns the order of sections and the budget. Each system has its own processes; one that fails becomes rows with a null
and the reason. Runs on CPU workers too, for a rehearsal.
"""

import asyncio
import importlib.util
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from tetrion.engine.config import DeviceSpec, EngineConfig
from tetrion.engine.errors import GenerationError
from tetrion.engine.executors.processes import ProcessExecutor
from tetrion.engine.hardware.nvml import gpu_facts
from tetrion.engine.measure.probe import PROMPT, Probe, Size
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.planning.cost.profile import ClassCost, Profile
from tetrion.engine.request import ImageRequest
from tetrion.engine.resolve import resolve_request
from tetrion.engine.shape import StepShape
from tetrion.entrypoints.bench.line_process import LineProcess, ProcessFailed
from tetrion.entrypoints.bench.rank_group import run_ranks
from tetrion.entrypoints.bench.step_points import exactness, idle_gaps, px_of, resize_every_step, time_floor, time_step
from tetrion.entrypoints.bench.step_record import FLOOR, OURS, Point, Row, StepRecord


class OtherSystem(NamedTuple):
    """`module`: of its ranks. `package`: what must be installed."""

    module: str
    package: str
    compiled: bool


OTHERS = {
    "diffusers eager": OtherSystem("tetrion.entrypoints.bench.diffusers_step", "diffusers", False),
    "diffusers compiled": OtherSystem("tetrion.entrypoints.bench.diffusers_step", "diffusers", True),
    "xfuser eager": OtherSystem("tetrion.entrypoints.bench.xfuser_step", "xfuser", False),
    "xfuser compiled": OtherSystem("tetrion.entrypoints.bench.xfuser_step", "xfuser", True),
}
STEPS, GAPS, RESIZING, EXACTNESS = "steps", "idle_gaps", "resizing", "exactness"
SECTIONS = (STEPS, GAPS, RESIZING, EXACTNESS)
"""What is measured of our own workers; `steps` with the floor in turn."""
START_S = 20.0
"""Nothing that begins with loading a model is begun with less time left."""
OUT_OF_TIME = "out of time"
MAX_INFLIGHT = 4
RESIZE_STEPS = 20


class StepOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`seconds`: how long each system is sustained at each point. `num_steps`: of the exactness report. `degrees`:
    those that are timed; resizing and exactness use all that the devices allow."""

    sizes: tuple[Size, ...]
    degrees: tuple[int, ...]
    systems: tuple[str, ...]
    num_steps: int
    sections: tuple[str, ...] = SECTIONS
    seconds: float = 5.0
    budget_s: float = 3600.0
    seed: int = 1


class StepBench:
    """One run: what `record` lacks of what `options` ask for."""

    def __init__(
        self,
        config: EngineConfig,
        spec: ModelSpec,
        devices: tuple[DeviceSpec, ...],
        options: StepOptions,
        record: StepRecord,
    ) -> None:
        self._config = msgspec.structs.replace(config, max_inflight=MAX_INFLIGHT)
        self._spec, self._devices, self._options, self._record = spec, devices, options, record
        self._until_s = time.monotonic() + options.budget_s
        self._points = [(size, degree) for size in self._sizes() for degree in options.degrees]

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
        executor = ProcessExecutor(self._devices, [self._spec], self._config)
        try:
            await executor.start()
        except GenerationError as error:
            self._record.add_missing(OURS, self._record.lacks(OURS, self._points), str(error))
            return
        try:
            self._record.contents["exchange"] = executor.exchange
            probe = Probe(executor, self._spec)
            if STEPS in self._options.sections:
                await self._time_points(probe)
            await self._measure_changes(probe)
        finally:
            await executor.close()

    async def _time_points(self, probe: Probe) -> None:
        points = self._record.lacks(OURS, self._points)
        floor = await self._start_floor() if FLOOR in self._options.systems else None
        reason, seconds = "", self._options.seconds
        try:
            for i, (size, degree) in enumerate(points):
                if self._left_s < 2 * seconds:
                    self._record.add_missing(OURS, points[i:], OUT_OF_TIME)
                    return
                try:
                    timed = await time_step(probe, size, degree, seconds, floor)
                except ProcessFailed as error:
                    reason = str(error)
                    timed = await time_step(probe, size, degree, seconds, None)
                self._add_point(size, degree, timed, reason)
        except GenerationError as error:
            self._record.add_missing(OURS, points[i:], str(error))
        finally:
            if floor is not None:
                await floor.close()

    async def _measure_floor_alone(self) -> None:
        floor = await self._start_floor()
        try:
            for size, degree in self._record.lacks(FLOOR, self._points):
                try:
                    ms = await time_floor(floor, self._spec, size, degree, self._options.seconds)
                except ProcessFailed as error:
                    self._record.add_missing(FLOOR, [(size, degree)], str(error))
                else:
                    self._record.add(FLOOR, size, degree, ms)
        finally:
            await floor.close()

    async def _start_floor(self) -> LineProcess:
        first, spec = self._devices[0], msgspec.json.encode(self._spec).decode()
        name = first.name if first.kind == "cuda" else "cpu"
        return await LineProcess.start("tetrion.entrypoints.bench.floor", spec, name)

    def _add_point(self, size: Size, degree: int, timed: Row, reason: str) -> None:
        floor_ms, ms = timed.pop("floor_ms"), timed.pop("ms")
        if FLOOR in self._options.systems:
            if floor_ms is None:
                self._record.add_missing(FLOOR, [(size, degree)], reason)
            else:
                self._record.add(FLOOR, size, degree, floor_ms)
        facts = [{"sm_mhz": gpu["sm_mhz"], "temperature_c": gpu["temperature_c"]} for gpu in gpu_facts()]
        self._record.add(OURS, size, degree, ms, **timed, **({"gpus": facts} if facts else {}))

    async def _measure_changes(self, probe: Probe) -> None:
        """Gaps, resizing, exactness: as far as the time allows, in this order."""
        options, sizes = self._options, self._sizes()
        try:
            profile = self._profile()
            if GAPS in options.sections and profile is not None:
                for degree in options.degrees:
                    gaps = idle_gaps(probe, self._config, profile, sizes[0], degree)
                    await self._extend(GAPS, f"{px_of(sizes[0])} at {degree}", gaps)
            if RESIZING in options.sections:
                await self._extend(RESIZING, f"{px_of(sizes[0])}", resize_every_step(probe, sizes[0], RESIZE_STEPS))
            for size in sizes if EXACTNESS in options.sections else ():
                rows = exactness(probe, size, options.num_steps, options.seed)
                await self._extend(EXACTNESS, f"{px_of(size)}", rows)
        except GenerationError as error:
            self._record.cut_short(str(error))

    async def _extend(self, section: str, part: str, rows: AsyncIterator[Row]) -> None:
        if self._record.begin(section, part) is None:
            return
        if self._left_s > 0:
            async for row in rows:
                self._record.grow(section, part, row)
                if self._left_s <= 0:
                    break
            else:
                self._record.finish(section, part)
                return
        self._record.cut_short(OUT_OF_TIME)

    def _sizes(self) -> tuple[Size, ...]:
        """The model's usual size comes first: what comes last may be cut."""
        usual = self._spec.sizes.default
        return tuple(sorted(self._options.sizes, key=lambda size: size != usual))

    def _profile(self) -> Profile | None:
        """The steps just timed, for the engine's own loop to plan with; None if there are none."""
        steps: dict[str, dict[int, float]] = {}
        keys = {px_of(size): self._usual_shape(size).cost_key for size in self._sizes()}
        for row in self._record.rows:
            if row["system"] == OURS and row["ms"] is not None and row["px"] in keys:
                steps.setdefault(keys[row["px"]], {})[row["degree"]] = row["ms"]
        classes = {key: ClassCost(step_ms=ms, encode_ms=10.0, decode_ms=50.0) for key, ms in steps.items()}
        return Profile(heads=self._spec.num_key_heads, classes=classes) if classes else None

    def _usual_shape(self, size: Size) -> StepShape:
        """Of a picture of this size, guided as the model is unless told otherwise."""
        asked = ImageRequest(prompt=PROMPT, width=size[0], height=size[1])
        return resolve_request(asked, self._spec, len(self._devices)).params.shape

    # Others -------------------------------------------------------------------------------------------------------

    def _measure_other(self, system: str, degree: int) -> None:
        other, record = OTHERS[system], self._record
        lacking = record.lacks(system, [point for point in self._points if point[1] == degree])
        devices = [device.index for device in self._devices[:degree]]
        if reason := self._why_not(other, devices, degree):
            record.add_missing(system, lacking, reason)
        if reason or not lacking:
            return
        points: dict[str, Point] = {str(px_of(size)): (size, degree) for size, _ in lacking}
        unit = self._spec.sizes.multiple
        job = {
            "transformer": str(Path(self._spec.path) / "transformer"),
            "device": self._devices[0].kind,
            "num_text": self._spec.max_text_tokens,
            "num_branches": self._usual_shape(lacking[0][0]).num_branches,
            "sizes": [[name, size[0] // unit, size[1] // unit] for name, (size, _) in points.items()],
            "seconds": self._options.seconds,
            "until_s": self._until_s - self._options.seconds,
            "compiled": other.compiled,
        }
        answers, failure = run_ranks(other.module, job, devices, self._left_s)
        for answer in answers:
            size, _ = points.pop(answer["name"])
            record.add(system, size, degree, answer.get("ms"), **_reason_of(answer))
        record.add_missing(system, points.values(), failure or OUT_OF_TIME)

    def _why_not(self, other: OtherSystem, devices: list[int], degree: int) -> str:
        """Why it is not even begun."""
        if self._left_s < START_S:
            return OUT_OF_TIME
        if len(set(devices)) < degree:
            return f"needs {degree} devices of its own"
        return "" if importlib.util.find_spec(other.package) else f"{other.package} is not installed"

    @property
    def _left_s(self) -> float:
        return self._until_s - time.monotonic()


def _reason_of(answer: Row) -> Row:
    return {"reason": answer["reason"]} if "reason" in answer else {}
