"""The threads that encode pictures: as many as there are processors, the most urgent picture first.

One picture may be made by several threads: whoever has begun it shares its parts out and makes those that nobody else
takes, so nobody waits for a thread that is not there.
"""

import asyncio
import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from tetrion.engine.hardware.control_groups import available_cpus
from tetrion.entrypoints.png import Each

MAX_THREADS = 32
SOFT_DUE_S = 5.0
"""What has no deadline is due so long after it has come."""

T = TypeVar("T")
R = TypeVar("R")


class Encoders:
    """Threads are started as they are needed, and end with this."""

    def __init__(self, num_threads: int | None = None) -> None:
        """`num_threads` None: one for each processor that this process may use, at most `MAX_THREADS`."""
        self.num_threads = num_threads or min(available_cpus(), MAX_THREADS)
        self._threads = ThreadPoolExecutor(self.num_threads, "tetrion-encoder")
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._waiting: list[tuple[float, int, Callable[[], None]]] = []

    async def run(self, work: Callable[[Each], T], due_s: float | None = None) -> T:
        """What `work` returns, done in these threads. What is due earlier goes first, by `time.monotonic`; None: in
        `SOFT_DUE_S`. Being cancelled takes back what has not begun."""
        future: Future[T] = Future()
        due_s = time.monotonic() + SOFT_DUE_S if due_s is None else due_s

        def job() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work(_Sharing(self, due_s)))
                except BaseException as error:
                    future.set_exception(error)

        self.put(job, due_s)
        return await asyncio.wrap_future(future)

    def put(self, job: Callable[[], None], due_s: float) -> None:
        """`job` raises nothing."""
        with self._lock:
            heapq.heappush(self._waiting, (due_s, next(self._numbers), job))
        self._threads.submit(self._run_most_urgent)

    def _run_most_urgent(self) -> None:
        with self._lock:
            _, _, job = heapq.heappop(self._waiting)
        job()


class _Sharing:
    """An `Each` by all threads that have nothing more urgent to do."""

    def __init__(self, encoders: Encoders, due_s: float) -> None:
        self._encoders, self._due_s = encoders, due_s

    def __call__(self, function: Callable[[T], R], items: Iterable[T], /) -> list[R]:
        parts = list(items)
        results: list[Any] = [None] * len(parts)
        errors: list[BaseException] = []
        numbers, done = itertools.count(), threading.Semaphore(0)

        def make_parts() -> None:
            while (i := next(numbers)) < len(parts):
                try:
                    results[i] = function(parts[i])
                except BaseException as error:
                    errors.append(error)
                finally:
                    done.release()

        for _ in range(min(self._encoders.num_threads, len(parts)) - 1):
            self._encoders.put(make_parts, self._due_s)
        make_parts()
        for _ in parts:
            done.acquire()
        if errors:
            raise errors[0]
        return results
