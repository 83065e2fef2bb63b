"""Answers of commands whose work is only enqueued: each is sent when its work is done, in order, by one thread.

Owns that thread and the order of a GPU worker's events, all of which leave through it (a ring has one producer). Knows
neither devices nor what a command does: `finish` waits and makes the event.
"""

import queue
import threading
import traceback
from collections.abc import Callable
from typing import NamedTuple

from tetrion.engine.messages import Command, Event
from tetrion.engine.parallel.cpu.barrier import Aborted
from tetrion.engine.worker.failures import NotFinite, failure_of
from tetrion.engine.worker.work_queue import DeviceBroken

Finish = Callable[[], Event]


class _Entry(NamedTuple):
    command: Command
    finish: Finish


class Completions:
    """`send` delivers an event; `on_broken` is called once the device cannot go on, after everything was answered;
    `on_start` is the first that the thread does."""

    def __init__(
        self,
        device_id: int,
        send: Callable[[Event], None],
        on_broken: Callable[[], None],
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        self._device_id, self._send, self._on_broken, self._on_start = device_id, send, on_broken, on_start
        self._entries: queue.SimpleQueue[_Entry | Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="completions", daemon=True)
        self._thread.start()

    def add(self, command: Command, finish: Finish) -> None:
        """`finish` runs on the thread, after all that was added before: it waits for the work and makes the answer."""
        self._entries.put(_Entry(command, finish))

    def send(self, event: Event) -> None:
        """An answer that waits for nothing but its turn."""
        self._entries.put(event)

    def close(self) -> None:
        """Return when all that was added has been sent."""
        self._entries.put(None)
        self._thread.join()

    def _run(self) -> None:
        self._on_start()
        while (entry := self._entries.get()) is not None:
            if isinstance(entry, _Entry):
                self._finish(entry)
            else:
                self._send(entry)

    def _finish(self, entry: _Entry) -> None:
        """Whatever goes wrong becomes a `Failed` event."""
        try:
            event = entry.finish()
        except Exception as error:
            if not isinstance(error, (Aborted, NotFinite)):
                traceback.print_exception(error)
            self._send(failure_of(entry.command, self._device_id, error))
            if isinstance(error, DeviceBroken):
                self._on_broken()
        else:
            self._send(event)
