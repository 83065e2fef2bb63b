"""The event loop that engine and server run on."""

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from tetrion.engine.hardware.standard_streams import hold_standard_descriptors

T = TypeVar("T")


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop where there is one, else asyncio's own."""
    hold_standard_descriptors()
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class LoopEnded(RuntimeError):
    """The loop has ended, and what was asked of it with it."""


class LoopThread:
    """A loop that runs in a thread of its own, so that any thread may ask it, also one with a running loop."""

    def __init__(self, name: str) -> None:
        self._runner = asyncio.Runner(loop_factory=new_event_loop)
        self._loop = self._runner.get_loop()
        self._stopping = asyncio.Event()
        self._lock = threading.Lock()
        self._is_open = True
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Do `work` in the loop and wait for it. Interrupted (Ctrl-C), it is cancelled. Raises LoopEnded."""
        with self._lock:
            future = asyncio.run_coroutine_threadsafe(work, self._loop) if self._is_open else None
        if future is None:
            work.close()
            raise LoopEnded
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise LoopEnded from None
        except BaseException:
            future.cancel()
            raise

    def soon(self, action: Callable[[], object]) -> None:
        """Have `action` called in the loop, unless it has ended."""
        with self._lock:
            if self._is_open:
                self._loop.call_soon_threadsafe(action)

    def end_with(self, work: Coroutine[Any, Any, object]) -> None:
        """Do `work`, then end; wait for it, unless this is the loop's own thread."""
        if threading.current_thread() is self._thread:
            self._last = self._loop.create_task(work)
            self._last.add_done_callback(lambda _: self._stop())
            return
        with contextlib.suppress(LoopEnded):
            self.call(work)
        self._stop()
        self._thread.join()

    def _stop(self) -> None:
        with self._lock:
            if self._is_open:
                self._is_open = False
                self._loop.call_soon_threadsafe(self._stopping.set)

    def _run(self) -> None:
        self._runner.run(self._stopping.wait())
        with contextlib.suppress(RuntimeError):  # at the interpreter's end it cannot start the thread that takes
            self._runner.close()
