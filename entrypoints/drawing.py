"""Drawing many pictures with one engine: a bounded number in flight, progress reported, cancelled together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from tetrion.engine.request import Delivered, ImageRequest, ImageResult, Progress

if TYPE_CHECKING:
    from tetrion.engine.api import AsyncEngine

MAX_IN_FLIGHT = 64

ProgressCallback = Callable[[Progress], None]
T = TypeVar("T")


async def draw(engine: AsyncEngine, request: ImageRequest, on_progress: ProgressCallback) -> ImageResult:
    """Draw one picture. Being cancelled cancels the request. Raises what `submit` and `result` raise."""
    handle = engine.submit(await engine.prepared(request))
    try:
        async for progress in handle:
            on_progress(progress)
        return await handle.result()
    except asyncio.CancelledError:
        handle.cancel()
        raise


async def deliver(engine: AsyncEngine, result: ImageResult, work: Awaitable[T]) -> tuple[T, Delivered]:
    """What `work` comes to, which writes the picture's file, and what came of the picture by then. The engine is told
    of both outcomes."""
    begun_s = time.monotonic()
    try:
        done = await work
    except BaseException:
        engine.not_delivered(result.request_id)
        raise
    delivered = engine.delivered(result.request_id, time.monotonic() - begun_s)
    assert delivered is not None, "the request had a delivery, and only now is it over"
    return done, delivered


async def uninterrupted(work: Coroutine[Any, Any, None]) -> None:
    """Do `work` to its end even if the caller is cancelled meanwhile; the cancellation is raised after it."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


async def for_each(
    requests: Iterable[ImageRequest],
    draw_one: Callable[[int, ImageRequest], Awaitable[None]],
    max_in_flight: int = MAX_IN_FLIGHT,
) -> None:
    """Call `draw_one(index, request)` for every request, at most `max_in_flight` at a time, in order of submission.

    The first exception cancels the others and is raised.
    """
    pending = enumerate(requests)

    async def take_and_draw() -> None:
        for index, request in pending:
            await draw_one(index, request)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(max_in_flight):
                group.create_task(take_and_draw())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
