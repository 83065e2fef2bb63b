"""A device's queue of work as the runner sees it: enqueue, mark, record once and replay, copy to and from the host.

A recording is made by CUDA's *relaxed* capture, which needs no run before it: kernels are loaded and libraries choose
theirs in its midst. So all bits come from recordings, whose kernels a library may choose otherwise than without.

Owns all use of CUDA streams, events, graphs and pinned memory in a worker; knows no model and no commands. A GPU has
one queue, on which everything runs in order. `ImmediateQueue` is the same without a GPU, for tests: work is done when
it is enqueued.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

Work = Callable[[], None]
PIECE_ENDS = (1, 4, 12, 28)
"""The numbers of the cuts at which a piece of a recording ends: while the device is at one, the next, longer one is
recorded."""
REANCHOR_S = 10.0


class DeviceBroken(RuntimeError):
    """The device reports an error that its process cannot recover from."""


class Mark(Protocol):
    """A point in a queue."""

    def wait(self) -> None:
        """Block until everything enqueued before it is done. Raises DeviceBroken. From any thread."""

    def time_s(self) -> float:
        """When that was, CLOCK_MONOTONIC; only after `wait`, on it or on a later one."""


class Recording(Protocol):
    """Work that is launched step by step once, and as a whole ever after."""

    def __call__(self) -> None:
        """Enqueue the work. The first time it is recorded, and enqueued piece by piece meanwhile."""

    def cut(self) -> None:
        """To be called by the work, between its parts: here a piece may end."""


class WorkQueue(Protocol):
    @property
    def device(self) -> torch.device: ...

    def mark(self) -> Mark:
        """Marks the point behind all that has been enqueued."""

    def record(self, work: Work) -> Recording:
        """Nothing is recorded yet."""

    def rehearse(self, work: Work, num_bytes: int) -> None:
        """Enqueue nothing, but make libraries choose and load what `work` needs, so that its first time is as quick as
        the others. That takes as much memory as `work` does, `num_bytes`; nothing is done unless twice that is free."""

    def to_host(self, tensor: Tensor) -> Tensor:
        """Enqueue a copy; the result is valid once a later mark has passed."""

    def to_device(self, tensor: Tensor) -> Tensor:
        """Enqueue a copy of a host tensor, which the caller may drop at once but not change."""

    def drain(self) -> None:
        """Wait for everything. Raises DeviceBroken."""


class CudaQueue:
    """Makes the device the calling thread's current one, and a new stream its current stream."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)
        self._stream, self._capture_stream = (torch.cuda.Stream(self.device) for _ in range(2))
        torch.cuda.set_stream(self._stream)
        self._pool = torch.cuda.graph_pool_handle()
        self._clock = DeviceClock(self._new_event())
        self._first = self.record(self._touch)  # a pool whose last graph goes can't be used again
        self._first.capture(is_run=False)

    def attach_thread(self) -> None:
        """Make the device that of the calling thread too, before it waits for marks: CUDA may open a context on the
        thread's device, and that of a new thread is GPU 0, whose memory is another worker's."""
        torch.cuda.set_device(self.device)

    def mark(self) -> Mark:
        return CudaMark(self._new_event(), self._clock)

    def record(self, work: Work) -> "CudaRecording":
        """All graphs share one memory pool: only one of them runs at a time."""
        return CudaRecording(work, self._stream, self._capture_stream, self._pool)

    def rehearse(self, work: Work, num_bytes: int) -> None:
        free_bytes, _ = torch.cuda.mem_get_info(self.device)
        if free_bytes > 2 * num_bytes:
            self.record(work).capture(is_run=False)

    def to_host(self, tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def drain(self) -> None:
        self.mark().wait()

    def _touch(self) -> None:
        torch.zeros(1, device=self.device)

    def _new_event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(self._stream)
        return event


class CudaRecording:
    """CUDA graphs of the work's pieces.

    They are not captured by `torch.cuda.graph`, which frees memory and waits for the device. Another thread gives
    pinned memory back meanwhile, for which torch records an event on the stream that used it, hence `capture_stream`,
    which is used for nothing else.
    """

    def __init__(self, work: Work, stream: torch.cuda.Stream, capture_stream: torch.cuda.Stream, pool: Any) -> None:
        """`pool`: of `torch.cuda.graph_pool_handle`."""
        self._work: Work | None = work
        self._stream, self._capture_stream, self._pool = stream, capture_stream, pool
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._num_cuts, self._is_run = 0, False

    def __call__(self) -> None:
        if self._work is not None:
            self.capture(is_run=True)
            return
        for graph in self._graphs:
            graph.replay()

    def cut(self) -> None:
        self._num_cuts += 1
        if self._is_run and self._num_cuts in PIECE_ENDS:
            self._end_piece()
            self._begin_piece()

    def capture(self, *, is_run: bool) -> None:
        """`is_run`: each piece is enqueued as soon as it is captured."""
        assert self._work is not None, "recorded already"
        self._graphs, self._num_cuts, self._is_run = [], 0, is_run
        with torch.cuda.stream(self._capture_stream):
            self._begin_piece()
            try:
                self._work()
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    self._graphs[-1].capture_end()
                raise
            self._end_piece()
        self._work = None  # which may have this recording: in a circle the graphs' memory would stay

    def _begin_piece(self) -> None:
        self._graphs.append(torch.cuda.CUDAGraph())
        self._graphs[-1].capture_begin(pool=self._pool, capture_error_mode="relaxed")

    def _end_piece(self) -> None:
        graph = self._graphs[-1]
        graph.capture_end()
        if self._is_run:
            with torch.cuda.stream(self._stream):
                graph.replay()


class CudaMark:
    def __init__(self, event: torch.cuda.Event, clock: "DeviceClock") -> None:
        self._event, self._clock = event, clock

    def wait(self) -> None:
        try:
            blocked = not self._event.query()
            self._event.synchronize()
            self._clock.observe(self._event, time.monotonic(), blocked)
        except RuntimeError as error:
            raise DeviceBroken(f"the device failed: {error}") from error

    def time_s(self) -> float:
        return self._clock.time_s(self._event)


class Timed(Protocol):
    """What the clock needs of an event."""

    def synchronize(self) -> None: ...

    def elapsed_time(self, later: Any, /) -> float:
        """Milliseconds from this event to `later`, of the same kind."""


class DeviceClock:
    """When a device's events happened, on the host's clock.

    The device tells only intervals between events, so one event, the anchor, is given a host time: that at which the
    host saw it. No event can have happened later than it was seen, so every sighting can only move the clock back, and
    what is left is the least delay of many. From time to time a new anchor follows the clocks' drift.
    """

    def __init__(self, anchor: Timed) -> None:
        anchor.synchronize()
        self._anchor = anchor, time.monotonic()

    def time_s(self, event: Timed) -> float:
        anchor, anchor_s = self._anchor
        return anchor_s + anchor.elapsed_time(event) / 1e3

    def observe(self, event: Timed, now_s: float, blocked: bool) -> None:
        """`event` had happened by `now_s`; `blocked`: the host was waiting for it."""
        predicted_s = self.time_s(event)
        if now_s < predicted_s or (blocked and predicted_s - self._anchor[1] > REANCHOR_S):
            self._anchor = event, now_s


class ImmediateMark:
    def __init__(self) -> None:
        self._time_s = time.monotonic()

    def wait(self) -> None:
        pass

    def time_s(self) -> float:
        return self._time_s


class ImmediateRecording:
    def __init__(self, work: Work) -> None:
        self._work = work

    def __call__(self) -> None:
        self._work()

    def cut(self) -> None:
        pass


class ImmediateQueue:
    device = torch.device("cpu")

    def mark(self) -> Mark:
        return ImmediateMark()

    def record(self, work: Work) -> "ImmediateRecording":
        return ImmediateRecording(work)

    def rehearse(self, work: Work, num_bytes: int) -> None:
        pass

    def to_host(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor

    def drain(self) -> None:
        pass
