"""The threads that encode pictures."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from tetrion.entrypoints import pictures
from tetrion.entrypoints.encoders import Encoders
from tetrion.entrypoints.png import Each


@asynccontextmanager
async def all_busy(encoders: Encoders) -> AsyncIterator[None]:
    """Meanwhile the only thread does something else."""
    is_busy, may_end = threading.Event(), threading.Event()

    def hold(each: Each) -> None:
        is_busy.set()
        assert may_end.wait(20)

    holding = asyncio.create_task(encoders.run(hold, 0.0))
    await asyncio.to_thread(is_busy.wait, 20)
    yield
    may_end.set()
    await holding


async def test_pictures_have_the_same_bytes_as_without_threads() -> None:
    image = np.random.default_rng(0).integers(0, 256, (700, 600, 3), dtype=np.uint8)
    expected = pictures.encode(image, text={"seed": "1"})
    for num_threads in (1, 2, 5):
        encoders = Encoders(num_threads)
        made = await asyncio.gather(
            *(encoders.run(lambda each: pictures.encode(image, text={"seed": "1"}, each=each)) for _ in range(4))
        )
        assert made == [expected] * 4


async def test_the_most_urgent_goes_first() -> None:
    encoders, order = Encoders(1), list[str]()
    async with all_busy(encoders):
        waiting = [
            asyncio.create_task(encoders.run(lambda each, name=name: order.append(name), due_s))  # type: ignore[misc]
            for name, due_s in (("patient", None), ("late", 3.0), ("soon", 1.0), ("then", 2.0))
        ]
        await asyncio.sleep(0)
    await asyncio.gather(*waiting)
    assert order == ["soon", "then", "late", "patient"]


async def test_one_picture_is_made_by_all_threads() -> None:
    encoders, everybody = Encoders(3), threading.Barrier(3)

    def make(each: Each) -> list[int]:
        return list(each(lambda i: everybody.wait(20), range(3)))

    assert sorted(await encoders.run(make)) == [0, 1, 2]


async def test_pictures_that_share_all_threads_do_not_wait_for_one_another() -> None:
    encoders = Encoders(2)
    made = await asyncio.gather(
        *(encoders.run(lambda each: list(each(lambda i: i * i, range(50))), due_s=float(-n)) for n in range(30))
    )
    assert made == [[i * i for i in range(50)]] * 30


async def test_an_error_in_a_part_is_the_pictures() -> None:
    encoders = Encoders(2)

    def fail(i: int) -> int:
        if i == 7:
            raise MemoryError("no room")
        return i

    with pytest.raises(MemoryError, match="no room"):
        await encoders.run(lambda each: each(fail, range(20)))
    assert await encoders.run(lambda each: list(each(abs, range(3)))) == [0, 1, 2]


async def test_what_was_cancelled_before_it_began_is_not_done() -> None:
    encoders, done = Encoders(1), list[str]()
    async with all_busy(encoders):
        cancelled = asyncio.create_task(encoders.run(lambda each: done.append("cancelled")))
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
    await encoders.run(lambda each: done.append("another"))
    assert done == ["another"]
