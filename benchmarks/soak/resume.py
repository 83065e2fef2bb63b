"""A worker dies at step 30 of 40: how many steps are drawn again, and is the picture the same?

On an engine in this process, since a request's degree cannot be forced over HTTP. The victim is the worker that has
used most CPU time since the request began: a member of its group.
"""

import asyncio
import hashlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.soak.processes import cpu_s
from benchmarks.soak.report import Check, Row, finish, none_of
from tetrion.engine.api import AsyncEngine
from tetrion.engine.config import EngineConfig
from tetrion.engine.errors import EngineOverloaded, GenerationError
from tetrion.engine.request import ImageRequest
from tetrion.entrypoints.bench.recording import Recorder

WORKERS = 3
SIZE = 192
BACK_WITHIN_S = 60.0


class Steps:
    """How many steps one request was set back, by its progress."""

    def __init__(self) -> None:
        self.last = self.num_repeated = 0

    def reached(self, step: int) -> None:
        self.num_repeated += max(0, self.last - step)
        self.last = step


async def draw(engine: AsyncEngine, recorder: Recorder, degree: int, steps: int, kill_at: int | None) -> Row:
    """One picture; a member of its group is killed when `kill_at` steps are done."""
    recorder.start(0.0)
    request = ImageRequest(
        prompt="a red circle above a blue square",
        seed=5,
        width=SIZE,
        height=SIZE,
        num_steps=steps,
        force_degrees=(degree,) * steps,
        request_id="0",
    )
    pids = list(engine.worker_pids().values())
    used_s, before = {pid: cpu_s(pid) for pid in pids}, _recovery(engine)
    handle, seen, killed_at = engine.submit(request), Steps(), None
    async for progress in handle:
        seen.reached(progress.step_index)
        if kill_at is not None and killed_at is None and progress.step_index >= kill_at:
            killed_at = progress.step_index
            os.kill(max(pids, key=lambda pid: cpu_s(pid) - used_s[pid]), signal.SIGKILL)
    row: Row = {"degree": degree, "killed_at": killed_at}
    try:
        result = await handle.result()
    except (GenerationError, EngineOverloaded) as error:
        return row | {"error": str(error)}
    counted = {name: value - before[name] for name, value in _recovery(engine).items() if value != before[name]}
    return row | {
        "sha256": hashlib.sha256(result.image.tobytes()).hexdigest(),
        "repeated": seen.num_repeated,
        "longest_chunk": max(chunk.chunk_steps for chunk in recorder.chunks),
        "latency_s": result.latency_s,
        "degrees": sorted(set(result.degrees)),
        "counted": counted,
    }


def _recovery(engine: AsyncEngine) -> dict[str, Any]:
    return msgspec.structs.asdict(engine.stats().recovery)


async def measure(*, steps: int, kill_at: int, repeats: int, degree: Sequence[int]) -> tuple[list[Row], list[Check]]:
    rows: list[Row] = []
    recorder = Recorder()
    async with AsyncEngine(EngineConfig(devices=f"cpu:{WORKERS}"), instrument=recorder) as engine:
        for forced in degree:
            for attempt in range(repeats + 1):
                async with asyncio.timeout(BACK_WITHIN_S):
                    while engine.stats().num_alive < WORKERS:  # noqa: ASYNC110 (nobody tells)
                        await asyncio.sleep(0.1)
                rows.append(await draw(engine, recorder, forced, steps, kill_at if attempt else None))
    true = rows[0].get("sha256")
    killed = [row for row in rows if row["killed_at"] is not None]
    beyond = [row for row in killed if row.get("repeated", steps) > row.get("longest_chunk", 0)]
    worst = max((row.get("repeated", steps) for row in killed), default=None)
    checks = [
        none_of("failed", sum("error" in row for row in rows)),
        none_of("wrong", sum("sha256" in row and row["sha256"] != true for row in rows)),
        Check(
            name="pictures whose worker was killed",
            figure=len(killed),
            bound=f"{repeats * len(degree)}",
            holds=len(killed) == repeats * len(degree),
        ),
        Check(
            name="steps repeated after a loss, most",
            figure=worst,
            bound="the interrupted chunk: at most each row's longest_chunk",
            holds=not beyond,
        ),
    ]
    return rows, checks


def command(command_line: str, output: Path, **options: Any) -> int:
    rows, checks = asyncio.run(measure(**options))
    return finish(command_line, rows, checks, output)
