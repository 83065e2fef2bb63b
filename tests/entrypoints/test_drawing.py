"""How many pictures are in the making at once, and that they end together."""

import asyncio

import pytest

from tests.entrypoints.conftest import FakeEngine
from tetrion.engine.config import EngineConfig
from tetrion.engine.errors import GenerationError
from tetrion.engine.request import ImageRequest
from tetrion.entrypoints import drawing

REQUESTS = [ImageRequest(prompt=str(i)) for i in range(20)]


async def test_the_bound_holds_and_is_reached() -> None:
    running, most = 0, 0

    async def draw_one(index: int, request: ImageRequest) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1

    await drawing.for_each(REQUESTS, draw_one, max_in_flight=3)
    assert (running, most) == (0, 3)


async def test_every_request_is_drawn_once_with_its_own_index() -> None:
    seen = []

    async def draw_one(index: int, request: ImageRequest) -> None:
        await asyncio.sleep(0)
        seen.append((index, request.prompt))

    await drawing.for_each(REQUESTS, draw_one, max_in_flight=4)
    assert sorted(seen) == [(i, str(i)) for i in range(20)]


async def test_the_first_failure_cancels_the_others_and_is_raised_as_itself() -> None:
    cancelled = []

    async def draw_one(index: int, request: ImageRequest) -> None:
        if index == 2:
            raise GenerationError("lost")
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.append(index)
            raise

    with pytest.raises(GenerationError, match="lost"):
        await drawing.for_each(REQUESTS, draw_one, max_in_flight=3)
    assert sorted(cancelled) == [0, 1]


async def test_cancelling_the_caller_cancels_the_request() -> None:
    async with FakeEngine(EngineConfig(devices="cpu:1")) as engine:
        request = ImageRequest(prompt="slow", seed=0)
        task = asyncio.create_task(drawing.draw(engine, request, lambda progress: None))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.handles[0].is_cancelled


async def test_progress_is_reported_step_by_step() -> None:
    steps = []
    async with FakeEngine(EngineConfig(devices="cpu:1")) as engine:
        request = ImageRequest(prompt="a star", seed=0, num_steps=3)
        result = await drawing.draw(engine, request, lambda progress: steps.append(progress.step_index))  # type: ignore[arg-type]
    assert steps == [1, 2, 3][: len(steps)] and steps and result.num_steps == 3
