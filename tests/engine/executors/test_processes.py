"""How pictures come back from real image slots, with no worker: copied in another thread, reported by `poll`."""

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.engine.specs import make_spec
from tetrion.engine.config import EngineConfig, parse_devices
from tetrion.engine.executors.base import PictureReady
from tetrion.engine.executors.processes import ProcessExecutor
from tetrion.engine.messages import Decode
from tetrion.engine.params import Params
from tetrion.engine.request import Receipt
from tetrion.engine.shape import StepShape
from tetrion.engine.transport.image_slab import ImageSlab

WIDTH, HEIGHT = 48, 32
SHAPE = StepShape(width=WIDTH, height=HEIGHT, image=6, text=(64,))
PARAMS = Params(model="", shape=SHAPE, num_steps=1, guidance=0.0, seed=0)
RECEIPT = Receipt(method="test")


class _Idle(ProcessExecutor):
    """Without workers; `images` has one slot."""

    def __init__(self) -> None:
        super().__init__(parse_devices("cpu:1"), make_spec(), EngineConfig())
        self.images = ImageSlab.create(num_slots=1, slot_bytes=3 * WIDTH * HEIGHT)
        self._segments: Any = SimpleNamespace(images=self.images, close=self.images.close)
        self._pool: Any = SimpleNamespace(poll=lambda: [], close=self._no_workers)

    async def _no_workers(self) -> None: ...

    def decode(self) -> Decode:
        slot = self.acquire_image_slot()
        assert slot is not None
        return Decode(
            command_id=7, request_id="a", state_id=1, slot=0, chunk_index=1, source=0, params=PARAMS, image_slot=slot
        )

    async def picture(self) -> PictureReady:
        while not (events := self.poll()):
            await asyncio.wait_for(self.wait(None), 10)
        (ready,) = events
        assert isinstance(ready, PictureReady) and ready.command_id == 7 and self.poll() == []
        return ready


def in_executor(act: Callable[[_Idle], Any]) -> Any:
    async def run() -> Any:
        executor = _Idle()
        try:
            return await act(executor)
        finally:
            await executor.close()

    return asyncio.run(run())


def test_a_picture_is_copied_and_its_slot_is_free_again() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)

    async def act(executor: _Idle) -> PictureReady:
        decode = executor.decode()
        executor.images.write(decode.image_slot, picture)
        executor.take_image(decode, lambda: RECEIPT)
        ready = await executor.picture()
        executor.images.write(decode.image_slot, np.zeros_like(picture))
        assert executor.images.num_free == 1 and ready.ready_s <= executor.now_s()
        return ready

    ready = in_executor(act)
    assert (ready.image == picture).all() and ready.receipt == RECEIPT and ready.error is None


def test_a_copy_that_fails_is_reported_and_its_slot_is_free_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise MemoryError("no room")

    async def act(executor: _Idle) -> PictureReady:
        monkeypatch.setattr(executor.images, "read", no_room)
        executor.take_image(executor.decode(), lambda: RECEIPT)
        ready = await executor.picture()
        assert executor.images.num_free == 1
        return ready

    ready = in_executor(act)
    assert isinstance(ready.error, MemoryError) and ready.image is None


def test_a_receipt_that_fails_is_reported() -> None:
    def broken() -> Receipt:
        raise ZeroDivisionError

    async def act(executor: _Idle) -> PictureReady:
        executor.take_image(executor.decode(), broken)
        return await executor.picture()

    assert isinstance(in_executor(act).error, ZeroDivisionError)


def test_a_receipt_that_has_to_wait_does_not_keep_the_event_loop_waiting() -> None:
    is_free = threading.Event()

    def waiting() -> Receipt:
        assert is_free.wait(10)
        return RECEIPT

    async def act(executor: _Idle) -> PictureReady:
        executor.take_image(executor.decode(), waiting)
        await asyncio.sleep(0)
        assert executor.poll() == [] and executor.images.num_free == 0
        is_free.set()
        return await executor.picture()

    assert in_executor(act).receipt == RECEIPT


def test_closing_waits_for_copies_under_way() -> None:
    is_free = threading.Event()

    def waiting() -> Receipt:
        assert is_free.wait(10)
        return RECEIPT

    async def act(executor: _Idle) -> None:
        executor.take_image(executor.decode(), waiting)
        closing = asyncio.create_task(executor.close())
        await asyncio.sleep(0.05)
        assert not closing.done()
        is_free.set()
        await closing
        assert executor.images.num_free == 1

    in_executor(act)
