"""What `tetrion bench step` measures on groups of real workers: steps beside the floor, resizing, gaps, exactness.

Each function measures one thing on an idle executor and returns plain rows. Knows no other system but the floor.
"""

import asyncio
import random
import statistics
from collections.abc import AsyncIterator, Sequence
from itertools import combinations_with_replacement, pairwise
from typing import Any, NamedTuple, cast

import msgspec
import numpy as np

from tetrion.engine.config import EngineConfig
from tetrion.engine.executors.base import Executor, Happening
from tetrion.engine.loop.loop import EngineLoop
from tetrion.engine.measure.probe import PROMPT, SEED, ChunkPlan, ChunkTimes, Members, Probe, Size
from tetrion.engine.messages import Denoised
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.planning.cost.correction import CostModels
from tetrion.engine.planning.cost.profile import Profile
from tetrion.engine.planning.policies.registry import get_planner
from tetrion.engine.request import Failure, ImageRequest, ImageResult, Output
from tetrion.engine.resolve import resolve_request
from tetrion.entrypoints.bench.line_process import LineProcess

Row = dict[str, Any]
SLICES = 2
"""Each system runs so many times, in turn: A B, B A."""
MIN_STEPS = 2
FLOOR_TIMEOUT_S = 120.0
NUM_RANDOM = 3
LONGEST_CHUNK = 4


async def time_step(probe: Probe, size: Size, degree: int, seconds: float, floor: LineProcess | None) -> Row:
    """Median milliseconds of a step and of the floor, which take turns on the first device, for `seconds` each."""
    if floor is not None:
        await _prepare_floor(floor, probe.spec, size, degree)
    members, num_steps = tuple(range(degree)), probe.spec.num_steps
    await probe.runs(size, num_steps, (members, 1), 1)  # records the graph
    (first,) = await probe.runs(size, num_steps, (members, min(MIN_STEPS, num_steps)), 1)
    slice_s = seconds / SLICES
    chunk_steps = max(1, min(num_steps, round(slice_s / first.step_s)))
    count = max(1, round(slice_s / (chunk_steps * first.step_s)))
    ours: list[float] = []
    floors: list[float] = []

    async def run_ours() -> None:
        ours.extend(1e3 * run.step_s for run in await probe.runs(size, num_steps, (members, chunk_steps), count))

    async def run_floor() -> None:
        if floor is not None:
            floors.extend(await _floor_ms(floor, slice_s))

    for i in range(SLICES):
        for run in (run_ours, run_floor) if i % 2 == 0 else (run_floor, run_ours):
            await run()
    return {
        "ms": statistics.median(ours),
        "floor_ms": statistics.median(floors) if floors else None,
        "chunk_steps": chunk_steps,
        "num_chunks": len(ours),
        "slowest_ms": max(ours),
    }


async def time_floor(floor: LineProcess, spec: ModelSpec, size: Size, degree: int, seconds: float) -> float:
    """Median milliseconds of the floor alone. Raises ProcessFailed."""
    await _prepare_floor(floor, spec, size, degree)
    return statistics.median(await _floor_ms(floor, seconds))


async def _prepare_floor(floor: LineProcess, spec: ModelSpec, size: Size, degree: int) -> None:
    asked = ImageRequest(prompt=PROMPT, width=size[0], height=size[1])
    shape = resolve_request(asked, spec, degree).params.shape
    await floor.ask({"shape": msgspec.to_builtins(shape), "degree": degree}, FLOOR_TIMEOUT_S)


async def _floor_ms(floor: LineProcess, seconds: float) -> list[float]:
    times: list[float] = (await floor.ask({"seconds": seconds}, seconds + FLOOR_TIMEOUT_S))["ms"]
    return times


async def resize_every_step(probe: Probe, size: Size, num_steps: int) -> AsyncIterator[Row]:
    """Two groups that take turns at every step, beside each of them alone in chunks of one step. Groups: the first and
    the last devices.

    A step is what its members spend from when all have entered the chunk, and what lies between two steps: handing the
    request over, coming together. `added_ms` is what a change of group adds to the latter, once both groups have had
    the request. The steps are told beside it and don't count, since groups that rest in turn run at other clocks than
    one that doesn't. `first_visit_ms`: what lies before a newcomer's first step, who computes the request's modulations
    beforehand.
    """
    num_devices = len(probe.executor.device_ids)
    degrees = probe.spec.legal_degrees(num_devices)
    alone: dict[Members, SplitSteps] = {}
    for narrow, wide in combinations_with_replacement(degrees, 2):
        first, last = tuple(range(narrow)), tuple(range(num_devices - wide, num_devices))
        if first == last:
            continue
        for group in (first, last):
            if group not in alone:
                alone[group] = split_steps(await _steps(probe, size, [group] * (2 + num_steps)), skipped=1)
        chunks = await _steps(probe, size, [(first, last)[i % 2] for i in range(2 + num_steps)])
        resizing, steady = split_steps(chunks, skipped=1), [alone[first], alone[last]]
        yield {
            "px": px_of(size),
            "groups": [list(first), list(last)],
            "step_ms": resizing.step_ms,
            "steady_step_ms": statistics.mean(split.step_ms for split in steady),
            "between_ms": resizing.between_ms,
            "steady_between_ms": (between_ms := statistics.mean(split.between_ms for split in steady)),
            "added_ms": resizing.between_ms - between_ms,
            "first_visit_ms": split_steps(chunks[:2], skipped=0).between_ms,
        }


class SplitSteps(NamedTuple):
    """Means over chunks of one step: the step itself, and what lies between it and the one before, milliseconds."""

    step_ms: float
    between_ms: float


def split_steps(chunks: Sequence[ChunkTimes], skipped: int) -> SplitSteps:
    """What happened from the end of chunk `skipped` to the end of the last one. If those two have the same members,
    how well the devices' clocks agree does not matter."""
    counted = chunks[skipped + 1 :]
    all_s, steps_s = chunks[-1].ended_s - chunks[skipped].ended_s, sum(chunk.net_s for chunk in counted)
    return SplitSteps(1e3 * steps_s / len(counted), 1e3 * (all_s - steps_s) / len(counted))


async def _steps(probe: Probe, size: Size, groups: Sequence[Members]) -> list[ChunkTimes]:
    """Each step of a request that has a chunk of its own; all are queued at once."""
    for group in set(groups):
        await probe.runs(size, 1, (group, 1), 1)  # records its graph
    request = probe.request(size, len(groups))
    await probe.encode(request)
    return await probe.denoise(request, [(group, 1) for group in groups])


async def idle_gaps(
    probe: Probe, config: EngineConfig, profile: Profile, size: Size, degree: int
) -> AsyncIterator[Row]:
    """One row: times between consecutive chunks of one request on one group, planned by the engine's own loop."""
    executor, spec, listener = probe.executor, probe.spec, _Listener(probe.executor)
    ended: asyncio.Queue[ImageResult | Failure] = asyncio.Queue()

    def receive(output: Output) -> None:
        if isinstance(output, (ImageResult, Failure)):
            ended.put_nowait(output)

    loop = EngineLoop(
        executor=cast(Executor, listener),
        planner=get_planner(config.planner.policy),
        cost_models=CostModels({spec.name: profile}),
        config=config,
        outputs=receive,
    )
    task = asyncio.create_task(loop.run())
    try:
        for request_id in ("0", "1"):  # the first one loads what has not run before
            listener.chunks.clear()
            request = ImageRequest(
                prompt=PROMPT,
                width=size[0],
                height=size[1],
                seed=SEED,
                force_degrees=(degree,),
                request_id=request_id,
            )
            loop.submit(resolve_request(request, spec, len(executor.device_ids)))
            output = await ended.get()
            if isinstance(output, Failure):
                raise output.error
    finally:
        loop.stop()
        await asyncio.wait([task])
    gaps = gaps_between(listener.chunks)
    row: Row = {"px": px_of(size), "degree": degree, "num_gaps": len(gaps)}
    if gaps:
        idle_ms, entered_ms = zip(*gaps, strict=True)
        times = {"median_ms": statistics.median(idle_ms), "max_ms": max(idle_ms)}
        yield row | times | {"until_entered_ms": statistics.median(entered_ms)}
    else:
        nothing = dict.fromkeys(("median_ms", "max_ms", "until_entered_ms"))
        yield row | nothing | {"reason": "the request ran in one chunk"}


class _Listener:
    """An executor that keeps what members say of their chunks; everything else goes straight through."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.chunks: list[Denoised] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def poll(self) -> list[Happening]:
        events = self._executor.poll()
        self.chunks += [event for event in events if isinstance(event, Denoised)]
        return events


def gaps_between(chunks: Sequence[Denoised]) -> list[tuple[float, float]]:
    """Milliseconds from the end of one chunk of a request to the beginning of the next on the same members, and until
    they had all entered it, each for the member that waited longest. A member's times are of its own clock."""
    by_command: dict[int, dict[int, Denoised]] = {}
    for chunk in chunks:
        by_command.setdefault(chunk.command_id, {})[chunk.device_id] = chunk
    ordered = [members for _, members in sorted(by_command.items())]
    return [
        (
            max(max(0.0, 1e3 * (after[device].started_s - before[device].ended_s)) for device in before),
            max(1e3 * (after[d].started_s + after[d].waited_s - before[d].ended_s) for d in before),
        )
        for before, after in pairwise(ordered)
        if before.keys() == after.keys()
    ]


async def exactness(probe: Probe, size: Size, num_steps: int, seed: int) -> AsyncIterator[Row]:
    """Latents after `num_steps` at every degree, on two sets of members each, and by random schedules, against those
    of device 0 alone."""
    expected = await _latents(probe, size, [((0,), num_steps)])
    for name, schedule in _schedules(probe, num_steps, random.Random(seed)):
        latents = await _latents(probe, size, schedule)
        yield {
            "px": px_of(size),
            "num_steps": num_steps,
            "schedule": name,
            "bit_identical": bool(np.array_equal(latents, expected)),
            "max_difference": float(np.abs(latents - expected).max()),
            "chunks": [[list(members), steps] for members, steps in schedule],
        }


def _schedules(probe: Probe, num_steps: int, dice: random.Random) -> list[tuple[str, list[ChunkPlan]]]:
    devices = probe.executor.device_ids
    degrees = probe.spec.legal_degrees(len(devices))
    fixed: list[tuple[str, list[ChunkPlan]]] = []
    for degree in degrees:
        fixed.append((f"degree {degree}", [(devices[:degree], num_steps)]))
        if len(devices) > 1:
            fixed.append((f"degree {degree}, last devices", [(devices[::-1][:degree], num_steps)]))
    for i in range(NUM_RANDOM):
        chunks: list[ChunkPlan] = []
        left = num_steps
        while left:
            steps = dice.randint(1, min(left, LONGEST_CHUNK))
            chunks.append((tuple(dice.sample(devices, dice.choice(degrees))), steps))
            left -= steps
        fixed.append((f"random {i}", chunks))
    return fixed


async def _latents(probe: Probe, size: Size, schedule: Sequence[ChunkPlan]) -> Any:
    request = probe.request(size, sum(steps for _, steps in schedule))
    await probe.encode(request)
    await probe.denoise(request, schedule)
    return await probe.latents(request)


def px_of(size: Size) -> int | str:
    """A square's side, else both sides."""
    return size[0] if size[0] == size[1] else f"{size[0]}x{size[1]}"
