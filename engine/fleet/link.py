"""One worker process and the channel to it, from its start to its end. Started again it is another link."""

import asyncio
import contextlib
import os
from collections.abc import Callable

from tetrion.engine.config import DeviceSpec
from tetrion.engine.fleet.segments import Segments, inherited
from tetrion.engine.messages import Event
from tetrion.engine.transport.channel import CommandSender, MalformedMessage, create_channel
from tetrion.engine.transport.ring import RingCorrupt
from tetrion.engine.worker.launcher import Launcher


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
        with contextlib.ExitStack() as undo:
            channel = create_channel(f"worker-{device.device_id}")
            undo.callback(channel.close)
            self._life_fd, worker_life_fd = os.pipe()
            undo.callback(os.close, self._life_fd)
            try:
                spec = segments.worker_spec(device, channel.spec, worker_life_fd)
                self._process = launcher.launch(spec, inherited(spec))
            finally:
                os.close(worker_life_fd)
            self.commands: CommandSender = channel.commands
            self._events = channel.events
            self._loop.add_reader(self._life_fd, self._on_life_pipe)
            undo.callback(self._loop.remove_reader, self._life_fd)
            self._loop.add_reader(self._events.fileno(), self._on_bell)
            undo.callback(self._loop.remove_reader, self._events.fileno())
            self._drain()  # from now on the worker rings
            self._resources = undo.pop_all()

    @property
    def pid(self) -> int:
        return self._process.pid

    def events(self) -> list[Event]:
        """What has arrived; never blocks. Nothing more once the worker has sent what is no event: see `fault`."""
        if self.has_ended:
            self._drain()
        received, self._received = self._received, []
        return received

    def kill(self) -> None:
        self._process.kill()

    async def end(self) -> str:
        """Wait until the process is gone (see `WorkerProcess.end`); returns how it ended. May be called again."""
        if self._ending is None:
            self._ending = asyncio.create_task(asyncio.to_thread(self._process.end))
        return await asyncio.shield(self._ending)

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
