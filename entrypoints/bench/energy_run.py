"""Measuring energy on a running engine: windows of a sweep, and arrivals in an open loop.

Counted is what all GPUs of the engine take between two moments, idle ones included. Encoding a picture as PNG is not
part of it. Knows the engine and a meter's windows, prints nothing.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from tetrion.engine.api import AsyncEngine
from tetrion.engine.errors import EngineOverloaded, GenerationError
from tetrion.engine.hardware.nvml import gpu_facts
from tetrion.engine.request import ImageRequest, ImageResult, Receipt
from tetrion.entrypoints.bench.energy_points import (
    MIN_WINDOWS,
    NUM_WARM_UPS,
    EnergyPoint,
    SweepOptions,
    interval,
    is_settled,
    shuffled,
)
from tetrion.entrypoints.bench.live import HEAD_START_S, open_loop, sleep_until
from tetrion.entrypoints.bench.simulation import as_image_request, prompt_of
from tetrion.entrypoints.bench.workloads import Trace, TraceRequest
from tetrion.entrypoints.energy_windows import EnergyWindows, WindowEnergy

Report = Callable[[str], None]
WARM_SHARE = 0.2
"""Of an open loop's arrivals: its steady state begins with the first one after these."""
NO_WINDOW = "no window was measured before the budget ended"


class MeasuredWindow(msgspec.Struct, frozen=True, kw_only=True):
    """`num_images` drawn in `energy.seconds`; `gpus`: their facts (temperature, clocks, …) at the end."""

    energy: WindowEnergy
    num_images: int
    latencies_s: tuple[float, ...]
    gpus: list[dict[str, Any]]

    @property
    def joules_per_image(self) -> float | None:
        return None if self.energy.total_j is None else self.energy.total_j / self.num_images


class PointResult(msgspec.Struct, frozen=True, kw_only=True):
    point: EnergyPoint
    windows: tuple[MeasuredWindow, ...]


class ClassResult(msgspec.Struct, frozen=True, kw_only=True):
    """One size of an open loop, over the whole trace. `attainment`: of those with an SLO, failed ones count as missed.
    `active_j`: mean of the receipts; None if any says nothing."""

    num_requests: int
    num_drawn: int
    attainment: float | None
    active_j: float | None


class SteadyState(msgspec.Struct, frozen=True, kw_only=True):
    """What an open loop took between `from_s` and `to_s` of the trace, and the pictures that were finished then.
    `by_class`: "all", then each size."""

    from_s: float
    to_s: float
    window: MeasuredWindow
    num_requests: int
    by_class: dict[str, ClassResult]


class EnergyBench:
    def __init__(self, engine: AsyncEngine, windows: EnergyWindows, report: Report = lambda _: None) -> None:
        self._engine, self._windows, self._report = engine, windows, report
        self.latest_receipt: Receipt | None = None
        self._number = 0
        self._drawn: dict[int, ImageResult] = {}

    async def idle(self, options: SweepOptions) -> WindowEnergy:
        """What the GPUs take with the model loaded and nothing to do."""
        await asyncio.sleep(options.cool_s)
        self._windows.begin()
        await sleep_until(time.monotonic() + options.window_s)
        return self._windows.end()

    async def sweep(
        self,
        points: Sequence[EnergyPoint],
        options: SweepOptions,
        after_round: Callable[[list[PointResult]], None] = lambda _: None,
    ) -> list[PointResult]:
        """Rounds of one window each, in random order, until every interval is narrow or the budget is over.
        `after_round` is given the results so far."""
        end_s = time.monotonic() + options.budget_s
        for point in points:
            self._report(f"warm-up: {point.text}")
            for _ in range(NUM_WARM_UPS):
                await self._draw(point)
        measured: dict[EnergyPoint, list[MeasuredWindow]] = {point: [] for point in points}
        open_points, round_number = list(points), 0
        while open_points and time.monotonic() < end_s:
            for point in shuffled(open_points, options, round_number):
                if time.monotonic() >= end_s:
                    break
                measured[point].append(await self._window(point, options))
                self._report(f"{point.text}: {_text(measured[point])}")
            open_points = [point for point in open_points if not _is_done(measured[point], options)]
            round_number += 1
            after_round(_results(measured))
        return _results(measured)

    async def arrivals(self, trace: Trace) -> SteadyState:
        """A trace in an open loop. Its steady state, by this rule: from the first arrival after `WARM_SHARE` of all
        until the last arrival; a picture counts if it was finished within."""
        first, last = trace[int(WARM_SHARE * len(trace))].arrival_s, trace[-1].arrival_s
        self._drawn = {}
        zero_s = time.monotonic() + HEAD_START_S
        metering = asyncio.create_task(self._between(zero_s + first, zero_s + last))
        finished, _ = await open_loop(trace, zero_s, self._draw_traced)
        energy = await metering
        latencies_s = [
            time_s - request.arrival_s
            for request, (time_s, _) in zip(trace, finished, strict=True)
            if time_s is not None and first <= time_s <= last
        ]
        window = MeasuredWindow(
            energy=energy, num_images=len(latencies_s), latencies_s=tuple(latencies_s), gpus=gpu_facts()
        )
        by_class = classes_of(trace, self._drawn)
        return SteadyState(from_s=first, to_s=last, window=window, num_requests=len(trace), by_class=by_class)

    async def _between(self, start_s: float, end_s: float) -> WindowEnergy:
        await sleep_until(start_s)
        self._windows.begin()
        await sleep_until(end_s)
        return self._windows.end()

    async def _window(self, point: EnergyPoint, options: SweepOptions) -> MeasuredWindow:
        """Lanes that draw one picture after the other until `window_s` is over; it ends when all are finished. What one
        lane has begun every lane draws, so that none stands idle for a whole picture at the end."""
        await asyncio.sleep(options.cool_s)
        self._windows.begin()
        end_s, num_per_lane = time.monotonic() + options.window_s, 0

        async def lane() -> list[float]:
            nonlocal num_per_lane
            latencies_s: list[float] = []
            while len(latencies_s) < num_per_lane or time.monotonic() < end_s:
                num_per_lane = max(num_per_lane, len(latencies_s) + 1)
                latencies_s.append(await self._draw(point))
            return latencies_s

        lanes = await asyncio.gather(*(lane() for _ in range(point.in_flight)))
        energy = self._windows.end()
        latencies_s = tuple(latency_s for lane in lanes for latency_s in lane)
        return MeasuredWindow(
            energy=energy, num_images=len(latencies_s), latencies_s=latencies_s, gpus=await asyncio.to_thread(gpu_facts)
        )

    async def _draw(self, point: EnergyPoint) -> float:
        """One picture; its latency."""
        self._number += 1
        result = await self._engine.generate(
            ImageRequest(
                prompt=prompt_of(self._number),
                width=point.width,
                height=point.height,
                num_steps=point.num_steps,
                seed=self._number,
                force_degrees=(point.degree,),
            )
        )
        self.latest_receipt = result.energy
        return result.latency_s

    async def _draw_traced(self, request: TraceRequest, number: int) -> tuple[int, ...] | None:
        try:
            result = await self._engine.generate(as_image_request(request, number))
        except (EngineOverloaded, GenerationError):
            return None
        self.latest_receipt = result.energy
        self._drawn[number] = msgspec.structs.replace(result, image=None)
        return result.degrees


def _results(measured: Mapping[EnergyPoint, Sequence[MeasuredWindow]]) -> list[PointResult]:
    return [PointResult(point=point, windows=tuple(windows)) for point, windows in measured.items()]


def classes_of(trace: Trace, drawn: Mapping[int, ImageResult]) -> dict[str, ClassResult]:
    """`drawn`: results by their place in the trace, without those that failed."""
    numbers: dict[str, list[int]] = {"all": list(range(len(trace)))}
    for number, request in sorted(enumerate(trace), key=lambda pair: (pair[1].width * pair[1].height, pair[0])):
        numbers.setdefault(f"{request.width}x{request.height}", []).append(number)
    return {size: _class_of(trace, drawn, places) for size, places in numbers.items()}


def _class_of(trace: Trace, drawn: Mapping[int, ImageResult], places: Sequence[int]) -> ClassResult:
    met = [place in drawn and bool(drawn[place].slo_met) for place in places if trace[place].slo_s is not None]
    active_j = [drawn[place].energy.active_j for place in places if place in drawn]
    known_j = [joules for joules in active_j if joules is not None]
    return ClassResult(
        num_requests=len(places),
        num_drawn=len(active_j),
        attainment=sum(met) / len(met) if met else None,
        active_j=sum(known_j) / len(known_j) if known_j and len(known_j) == len(active_j) else None,
    )


def joules(windows: Sequence[MeasuredWindow]) -> tuple[float | None, tuple[float, float] | None, str]:
    """Mean joules a picture over windows, its interval, and why they are None."""
    if not windows:
        return None, None, NO_WINDOW
    known = [window.joules_per_image for window in windows]
    if None in known:
        return None, None, next(window.energy.reason for window in windows if window.joules_per_image is None)
    return *interval([value for value in known if value is not None]), ""


def _is_done(windows: Sequence[MeasuredWindow], options: SweepOptions) -> bool:
    """Without joules there is nothing to narrow: the least number of windows does."""
    known = [window.joules_per_image for window in windows if window.joules_per_image is not None]
    return len(windows) >= MIN_WINDOWS and (len(known) < len(windows) or is_settled(known, options.target))


def _text(windows: Sequence[MeasuredWindow]) -> str:
    mean, ci95, reason = joules(windows)
    if mean is None:
        return f"window {len(windows)}, no joules: {reason}"
    return f"window {len(windows)}, {mean:.1f} J" + (f" ± {100 * (ci95[1] / mean - 1):.1f} %" if ci95 else "")
