"""A device's queue of work as the runner sees it: enqueue, mark, record once and replay, copy to and from the host.

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
REANCHOR_S = 10.0


class DeviceBroken(RuntimeError):
    """The device reports an error that its process cannot recover from."""


class Mark(Protocol):
    """A point in a queue."""

    def wait(self) -> None:
        """Block until everything enqueued before it is done. Raises DeviceBroken. From any thread."""

    def time_s(self) -> float:
        """When that was, CLOCK_MONOTONIC; only after `wait`, on it or on a later one."""


class WorkQueue(Protocol):
    @property
    def device(self) -> torch.device: ...

    def mark(self) -> Mark:
        """Marks the point behind all that has been enqueued."""

    def record(self, work: Work) -> Work:
        """What enqueues `work` each time it is called. Recording may enqueue it once, or not at all."""

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

    def attach_thread(self) -> None:
        """Make the device that of the calling thread too, before it waits for marks: CUDA may open a context on the
        thread's device, and that of a new thread is GPU 0, whose memory is another worker's."""
        torch.cuda.set_device(self.device)

    def mark(self) -> Mark:
        return CudaMark(self._new_event(), self._clock)

    def record(self, work: Work) -> Work:
        """A CUDA graph of `work`, which is run first: that loads kernels and makes the libraries choose theirs, none of
        which can be recorded. All graphs share one memory pool: only one of them runs at a time.

        Not by `torch.cuda.graph`, which frees memory and waits for the device. Another thread waits on events
        meanwhile, hence `thread_local`; and it gives pinned memory back, for which torch records an event on the stream
        that used it, hence a stream that is used for nothing else.
        """
        work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._capture_stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph.replay

    def to_host(self, tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def drain(self) -> None:
        self.mark().wait()

    def _new_event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(self._stream)
        return event


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


class ImmediateQueue:
    device = torch.device("cpu")

    def mark(self) -> Mark:
        return ImmediateMark()

    def record(self, work: Work) -> Work:
        return work

    def to_host(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor

    def drain(self) -> None:
        pass
