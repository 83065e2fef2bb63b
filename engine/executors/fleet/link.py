"""One worker process and the channel to it, from its start to its end. Started again it is another link."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from typing import TypeVar

from tetrion.engine.config import DeviceSpec
from tetrion.engine.executors.fleet.forks import no_fork
from tetrion.engine.executors.fleet.launch import Launcher
from tetrion.engine.executors.fleet.segments import Segments, inherited
from tetrion.engine.messages import Event
from tetrion.engine.transport.channel import CommandSender, MalformedMessage, create_channel
from tetrion.engine.transport.ring import RingCorrupt

T = TypeVar("T")

logger = logging.getLogger(__name__)
TERMINATE_AFTER_S = 5.0
KILL_AFTER_S = 2.0
FIRST_LOOK_S, LONGEST_LOOK_S = 0.001, 0.05
"""How soon it is looked again whether a process is gone, at first and at last."""


class WorkerLink:
    """Belongs to the running asyncio loop: `on_events` is called when there may be events, `on_end` once, when the
    worker has closed its life pipe (which every way to die does)."""

    def __init__(
        self,
        device: DeviceSpec,
        segments: Segments,
        launcher: Launcher,
        on_events: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        """Start the worker. Raises OSError (SharedMemoryError) if there is no room for one more."""
        self.device_id = device.device_id
        self.has_ended = False
        self.fault = ""
        """Why the worker is not listened to any more."""
        self._on_events, self._on_end = on_events, on_end
        self._received: list[Event] = []
        self._loop = asyncio.get_running_loop()
        self._ending: asyncio.Task[str] | None = None
        with contextlib.ExitStack() as undo, no_fork():
            channel = create_channel(f"worker-{device.device_id}")
            undo.callback(channel.close)
            self.commands: CommandSender = channel.commands
            self._events = channel.events
            self._life_fd, worker_life_fd = os.pipe()
            undo.callback(os.close, self._life_fd)
            try:
                self._loop.add_reader(self._life_fd, self._on_life_pipe)
                undo.callback(self._loop.remove_reader, self._life_fd)
                self._loop.add_reader(self._events.fileno(), self._on_bell)
                undo.callback(self._loop.remove_reader, self._events.fileno())
                self._drain()  # from now on the worker rings
                # Last of all: whatever fails, there is no worker that nobody knows of.
                spec = segments.worker_spec(device, channel.spec, worker_life_fd)
                self._process = launcher.launch(spec, inherited(spec), self._life_fd)
            finally:
                os.close(worker_life_fd)
            self._resources = undo.pop_all()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def was_refused(self) -> bool:
        """Whether there has never been a process, because the machine had no room for one just then."""
        return self._process.was_refused

    def started(self, pid: int) -> None:
        """The worker says that it has started: what it takes to end it is taken while it is alive."""
        self._attempt(lambda: self._process.started(pid))

    def events(self) -> list[Event]:
        """What has arrived; never blocks. Nothing more once the worker has sent what is no event: see `fault`."""
        if self.has_ended:
            self._drain()
        received, self._received = self._received, []
        return received

    def kill(self) -> None:
        """One that has closed its life pipe is dying: `end` follows it."""
        self._attempt(self._process.kill)

    async def end(self) -> str:
        """Wait for a worker that was told to shut down or has closed its life pipe; terminate, then kill, one that does
        not go. Returns how it ended, for people: it computes and stores nothing any more. May be called again."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end())
        return await asyncio.shield(self._ending)

    async def _end(self) -> str:
        for timeout_s, stronger in ((TERMINATE_AFTER_S, self._process.terminate), (KILL_AFTER_S, self._process.kill)):
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(self._gone(), timeout_s)
            self._attempt(stronger)
        return await self._gone()

    async def _gone(self) -> str:
        """Neither a thread nor a descriptor is needed: there may be none to be had."""
        pause_s = FIRST_LOOK_S
        while (how := self._attempt(self._process.how_it_ended)) is None:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_LOOK_S)
        return how

    def _attempt(self, action: Callable[[], T]) -> T | None:
        """What the machine refuses now may be had a moment later."""
        try:
            return action()
        except OSError as error:
            logger.warning("worker %d: %s", self.device_id, error)
            return None

    def close(self) -> None:
        """Give the channel back. Only when the process is gone and its last events are read."""
        self._resources.close()

    def _on_bell(self) -> None:
        """Read at once, not when somebody asks: this is called again and again until the doorbell is cleared."""
        self._drain()
        self._on_events()

    def _drain(self) -> None:
        if self.fault:
            return
        try:
            self._received += self._events.drain()
        except (MalformedMessage, RingCorrupt) as error:
            self.fault = f"what it sends is no event: {error}"

    def _on_life_pipe(self) -> None:
        self._loop.remove_reader(self._life_fd)
        self.has_ended = True
        self._on_end()
