"""The worker processes of an engine: started, watched, started again. Owns every link and what becomes of it.

    launch ──▶ bring-up ──▶ ready ──died──▶ lost ──`revive`──▶ unmapped ──pause──▶ launch …
                  └────────── died ──────────▲

A worker counts as lost when its process is gone for good, so that nothing it computed can still arrive anywhere. Its
place is taken anew only after `revive`, by which the loop says that all others are idle; again and again, after ever
longer pauses (respawn.py). Whatever fails between the end of its life pipe and the news of its loss, the news comes.
"""

import asyncio
import functools
import logging
import time
from collections.abc import Callable

from tetrion.engine.config import DeviceSpec
from tetrion.engine.executors.base import WorkerLost, WorkerReady
from tetrion.engine.executors.fleet.bring_up import BringUp
from tetrion.engine.executors.fleet.launch import Launcher
from tetrion.engine.executors.fleet.link import WorkerLink
from tetrion.engine.executors.fleet.respawn import RespawnPolicy
from tetrion.engine.executors.fleet.segments import Segments
from tetrion.engine.messages import Command, Event, Shutdown, Started
from tetrion.engine.model_spec import CheckpointError
from tetrion.engine.transport.channel import send_to_all

logger = logging.getLogger(__name__)


class WorkerPool:
    """`wake` is called when `poll` has something to say. `alive`: ready and not known dead. Use on one asyncio loop."""

    def __init__(
        self, devices: tuple[DeviceSpec, ...], segments: Segments, start_timeout_s: float, wake: Callable[[], None]
    ) -> None:
        self.alive: frozenset[int] = frozenset()
        self._devices = {device.device_id: device for device in devices}
        self._segments = segments
        self._start_timeout_s = start_timeout_s
        self._on_news, self._has_news = wake, False
        self._have_all_been_up = False
        self._policy = RespawnPolicy()
        self._bring_up = BringUp(
            tuple(self._devices),
            self._send,
            segments.reserve_slabs,
            shared_weights=devices[0].kind == "cpu",
            host_memory=segments.slabs_in_host_memory,
        )
        self._launcher = Launcher(devices[0].kind)
        self._links: dict[int, WorkerLink] = {}
        self._kill_reasons: dict[int, str] = {}
        self._ended: dict[int, str] = {}
        self._dead: dict[int, float] = {}
        self._pauses: dict[int, float] = {}
        self._last_words: dict[int, str] = {}
        """Why each device's worker had to be started again the last time."""
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._burials: set[asyncio.Task[str]] = set()

    @property
    def weights_bytes(self) -> int:
        return self._bring_up.weights_bytes

    @property
    def device_uuids(self) -> dict[int, str]:
        """UUID of the GPU of each GPU worker, by device id."""
        return self._bring_up.device_uuids

    @property
    def occupied(self) -> frozenset[int]:
        """Workers that do something beside their commands, which may take seconds."""
        return self._bring_up.mapping

    def pids(self) -> dict[int, int]:
        """Process id of each worker that is alive, by device id."""
        return {device_id: self._links[device_id].pid for device_id in sorted(self.alive)}

    def start(self) -> None:
        """Start all workers. Raises OSError."""
        for device_id in self._devices:
            self._launch(device_id)

    def submit(self, command: Command, members: tuple[int, ...]) -> bool:
        return send_to_all([self._links[member].commands for member in members], command)

    def kill(self, device_id: int, reason: str) -> None:
        link = self._links.get(device_id)
        if link is None or link.has_ended:
            return  # its loss has been reported, or will be: its burial is under way
        if device_id not in self._kill_reasons:
            logger.error("killing worker %d: %s", device_id, reason)
            self._kill_reasons[device_id] = reason
        link.kill()

    def poll(self) -> list[Event | WorkerLost | WorkerReady]:
        """What happened since the last call, a worker's events before its end.

        Raises CheckpointError if a worker cannot load a model before all workers have been up: no other could. Later
        it is that worker's trouble, and one that is started again may find the files as they were.
        """
        if not self._has_news:
            return []
        self._has_news = bool(self._ended)  # an end may leave others to be told of in the next call
        events: list[Event | WorkerLost | WorkerReady] = []
        for link in self._links.values():
            for event in link.events():
                if isinstance(event, Started):
                    link.started(event.pid)
                if not self._bring_up.handle(event):
                    events.append(event)
            if link.fault:
                self.kill(link.device_id, link.fault)
        if self._bring_up.refusal and not self._have_all_been_up:
            raise CheckpointError(self._bring_up.refusal)
        for device_id, reason in self._bring_up.take_failed().items():
            self.kill(device_id, reason)
        events += [ready for device_id in self._bring_up.take_ready() if (ready := self._on_ready(device_id))]
        ended, self._ended = self._ended, {}
        for device_id, reason in ended.items():
            events.append(self._on_ended(device_id, reason))
        self._respawn()
        return events

    def revive(self) -> None:
        """All workers are idle and know of all losses so far: the lost ones may be replaced."""
        dead, self._dead = self._dead, {}
        for device_id, pause_s in dead.items():
            self._pauses[device_id] = pause_s
            self._bring_up.unmap(device_id)
        self._respawn()

    async def close(self) -> None:
        """Shut the workers down; those that do not go are terminated, then killed."""
        for timer in self._timers.values():
            timer.cancel()
        for device_id, link in self._links.items():
            if device_id not in self.alive or not self.submit(Shutdown(command_id=0), (device_id,)):
                link.kill()
        await asyncio.gather(*(link.end() for link in self._links.values()), return_exceptions=True)
        for link in self._links.values():
            link.close()
        await asyncio.gather(*self._burials, return_exceptions=True)
        self._launcher.close()
        self._links = {}
        self.alive = frozenset()

    def _wake(self) -> None:
        """There is something that `poll` has not seen."""
        self._has_news = True
        self._on_news()

    # Lives -------------------------------------------------------------------------------------------------------

    def _launch(self, device_id: int) -> None:
        link = WorkerLink(
            self._devices[device_id],
            self._segments,
            self._launcher,
            on_events=self._wake,
            on_end=lambda: self._on_life_pipe(device_id),
        )
        self._links[device_id] = link
        self._has_news = True  # it may have spoken before it was listened to
        self._set_timer(
            device_id,
            self._start_timeout_s,
            lambda: self.kill(device_id, f"not ready within the start timeout of {self._start_timeout_s:g} s"),
        )

    def _on_ready(self, device_id: int) -> WorkerReady | None:
        if self._links[device_id].has_ended:
            return None
        self._cancel_timer(device_id)
        self._policy.ready(device_id, time.monotonic())
        self.alive |= {device_id}
        self._have_all_been_up |= len(self.alive) == len(self._devices)
        return WorkerReady(device_id=device_id)

    def _on_life_pipe(self, device_id: int) -> None:
        self.alive -= {device_id}
        burial = asyncio.create_task(self._links[device_id].end())
        self._burials.add(burial)
        burial.add_done_callback(functools.partial(self._on_buried, device_id))

    def _on_buried(self, device_id: int, burial: asyncio.Task[str]) -> None:
        """However the burial went: its worker has closed its life pipe and is lost."""
        self._burials.discard(burial)
        error = None if burial.cancelled() else burial.exception()
        if error is not None:
            logger.error("worker %d could not be followed to its end", device_id, exc_info=error)
        known = not burial.cancelled() and error is None
        self._ended[device_id] = burial.result() if known else "it could not be followed to its end"
        self._wake()

    def _on_ended(self, device_id: int, reason: str) -> WorkerLost:
        self._cancel_timer(device_id)
        link = self._links.pop(device_id)
        link.close()
        self._bring_up.lost(device_id)
        reason = self._last_words[device_id] = self._kill_reasons.pop(device_id, reason)
        if link.was_refused:
            self._dead[device_id] = self._policy.refused(device_id)
        else:
            self._dead[device_id] = self._policy.died(device_id, time.monotonic())
        return WorkerLost(device_id=device_id, reason=reason)

    def _respawn(self) -> None:
        """Start those again whose slab nobody maps any more."""
        for device_id in self._bring_up.take_unmapped():
            self._launch_after(self._pauses.pop(device_id), device_id)

    def _launch_after(self, pause_s: float, device_id: int) -> None:
        reason = self._last_words[device_id]
        logger.warning("worker %d is started again in %g s; the reason: %s", device_id, pause_s, reason)
        self._set_timer(device_id, pause_s, functools.partial(self._launch_again, device_id))

    def _launch_again(self, device_id: int) -> None:
        try:
            self._launch(device_id)
        except OSError as error:
            self._last_words[device_id] = f"it cannot be started: {error}"
            self._launch_after(self._policy.refused(device_id), device_id)
        self._wake()  # it is `poll` that makes a worker ring

    def _send(self, command: Command, device_id: int) -> None:
        link = self._links.get(device_id)
        if link is not None and not self.submit(command, (device_id,)):
            self.kill(device_id, "it does not take its commands")

    def _set_timer(self, device_id: int, delay_s: float, action: Callable[[], None]) -> None:
        """The one thing that is to happen to a device after some time."""
        self._timers[device_id] = asyncio.get_running_loop().call_later(delay_s, action)

    def _cancel_timer(self, device_id: int) -> None:
        timer = self._timers.pop(device_id, None)
        if timer is not None:
            timer.cancel()
