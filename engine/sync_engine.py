"""`Engine`: the synchronous twin of `AsyncEngine`, in the manner of vLLM's `LLMEngine`.

with Engine() as engine:
    results = engine.generate(["a red circle", "a green star"])
"""

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, Self, TypeVar

from tetrion.engine.api import AsyncEngine, RequestHandle, check_process
from tetrion.engine.config import EngineConfig
from tetrion.engine.errors import GenerationError, RequestError, shown
from tetrion.engine.hardware.event_loop import LoopEnded, LoopThread
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.request import Delivered, Failure, ImageRequest, ImageResult

T = TypeVar("T")
CLOSED = "the engine is closed"


class Engine:
    """The engine for synchronous code. Its event loop runs in a thread of its own, so it works in a notebook, whose
    loop is running, and may be used from several threads at once. A process forked from its own cannot use it."""

    def __init__(self, config: EngineConfig | None = None, g_per_kwh: Callable[[], float | None] | None = None) -> None:
        """Starts the engine at once; raises as `AsyncEngine.start`. Call `close`, or use it in a `with`.

        `g_per_kwh`: as for `AsyncEngine`."""
        self._owner = os.getpid()
        self._closing = threading.Lock()
        self._is_closed = False
        self._engine = AsyncEngine(config, g_per_kwh=g_per_kwh)
        self._thread = LoopThread("tetrion-engine")
        self._desk = _Desk(self._engine)
        self._forgotten = weakref.finalize(self, _end, self._engine, self._thread, self._owner)
        try:
            self._call(self._engine.start())
        except BaseException:
            self.close()
            raise
        self.models = self._engine.models
        self.devices = self._engine.devices

    @property
    def spec(self) -> ModelSpec:
        """Of the model that requests get which name none."""
        return self.models.default

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers and give all memory back. Requests still alive fail with GenerationError, and so does
        whatever is asked afterwards. May be called again, from any thread, while others wait for pictures; in a forked
        process it leaves its parent's engine alone."""
        if self._owner != os.getpid():
            return
        with self._closing:
            self._is_closed = True
            self._forgotten()

    def add_request(self, request: ImageRequest | str) -> str:
        """Queue a request and return its id. Raises as `AsyncEngine.submit`."""
        return self._call(self._desk.add(request))

    def abort_request(self, request_id: str) -> None:
        """Give a request up; it comes back from `step` as a Failure with RequestCancelled."""
        check_process(self._owner)
        self._thread.soon(lambda: self._desk.cancel(request_id))

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has something to return, now or later."""
        return self._desk.is_busy

    def step(self) -> list[ImageResult | Failure]:
        """Wait until at least one request of `add_request` has ended; return all that have. Nothing unfinished: an
        empty list. Each comes out once, whichever thread asks. Raises GenerationError if the engine is closed."""
        return self._call(self._desk.step())

    def generate(self, requests: Iterable[ImageRequest | str] | ImageRequest | str) -> list[ImageResult]:
        """Draw all pictures and return them in order; a single request is a list of one. Raises the first failure (the
        others are drawn all the same); of a request that is refused the others are given up. What is added by
        `add_request` is left for `step`."""
        handles: list[RequestHandle] = []
        try:
            for request in _each(requests):
                handles.append(self._call(self._desk.submit(request)))
            outcomes = self._call(_outcomes(handles))
        except BaseException:
            if handles:
                self._thread.soon(lambda: _cancel(handles))
            raise
        results = []
        for outcome in outcomes:
            if isinstance(outcome, Failure):
                raise outcome.error
            results.append(outcome)
        return results

    def delivered(self, request_id: str, took_s: float) -> Delivered | None:
        """As `AsyncEngine.delivered`."""
        return self._call(self._desk.delivered(request_id, took_s))

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Raises GenerationError if the engine is closed, or another process's."""
        try:
            check_process(self._owner)
            if self._is_closed:
                raise GenerationError(CLOSED)
        except GenerationError:
            work.close()
            raise
        try:
            return self._thread.call(work)
        except LoopEnded:
            raise GenerationError(CLOSED) from None


class _Desk:
    """The requests of `add_request`. Everything but `is_busy` runs in the engine's loop."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._unfinished: dict[str, asyncio.Task[None]] = {}
        self._handles: dict[str, RequestHandle] = {}
        self._ended: list[ImageResult | Failure] = []
        self._news = asyncio.Condition()

    @property
    def is_busy(self) -> bool:
        return bool(self._unfinished or self._ended)

    async def submit(self, request: ImageRequest | str) -> RequestHandle:
        return self._engine.submit(await self._engine.prepared(request))

    async def add(self, request: ImageRequest | str) -> str:
        handle = await self.submit(request)
        self._handles[handle.request_id] = handle
        self._unfinished[handle.request_id] = asyncio.create_task(self._follow(handle))
        return handle.request_id

    async def delivered(self, request_id: str, took_s: float) -> Delivered | None:
        return self._engine.delivered(request_id, took_s)

    def cancel(self, request_id: str) -> None:
        if request_id in self._handles:
            self._handles[request_id].cancel()

    async def step(self) -> list[ImageResult | Failure]:
        async with self._news:
            await self._news.wait_for(lambda: self._ended or not self._unfinished)
        ended, self._ended = self._ended, []
        return ended

    async def _follow(self, handle: RequestHandle) -> None:
        outcome = await _outcome(handle)
        del self._unfinished[handle.request_id], self._handles[handle.request_id]
        self._ended.append(outcome)
        async with self._news:
            self._news.notify_all()


def _end(engine: AsyncEngine, thread: LoopThread, owner: int) -> None:
    """Also of an engine that was forgotten, by the garbage collector or at the end of the process."""
    if owner == os.getpid():
        thread.end_with(engine.close())


def _each(requests: Iterable[ImageRequest | str] | ImageRequest | str) -> Iterable[ImageRequest | str]:
    """One after the other. Raises RequestError for what has none: of a table or a mapping one would get the names."""
    kind = type(requests)
    if issubclass(kind, (str, ImageRequest)):
        return (requests,)  # type: ignore[return-value]
    has_others = issubclass(kind, (bytes, bytearray, memoryview, Mapping)) or hasattr(kind, "columns")
    try:
        if not has_others and not isinstance(requests, type):
            return iter(requests)  # type: ignore[arg-type]
    except TypeError:
        pass
    expected = "must be a prompt, an ImageRequest, or a list or other iterable of them"
    if hasattr(kind, "__aiter__"):
        expected += " that is not asynchronous"
    raise RequestError("requests", f"{expected}, got {shown(requests)}")


def _cancel(handles: list[RequestHandle]) -> None:
    for handle in handles:
        handle.cancel()


async def _outcomes(handles: list[RequestHandle]) -> list[ImageResult | Failure]:
    return await asyncio.gather(*map(_outcome, handles))


async def _outcome(handle: RequestHandle) -> ImageResult | Failure:
    try:
        return await handle.result()
    except asyncio.CancelledError:
        raise
    except Exception as error:
        return Failure(request_id=handle.request_id, error=error)
