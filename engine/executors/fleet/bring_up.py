"""The way of a worker from a new process to one that takes requests: which commands it is given, in which order.

    launched ──Started──▶ mapping (GPUs: peer_mapping.py) ──LoadWeights──▶ loading ──Loaded──▶ ready

Slabs are mapped first, because what a worker prepares while it loads refers to them. Weights that are shared are
filled in by one worker; the others wait for it, then map what it wrote. The same steps serve the start of the engine
and a worker that is started again later; only at the start do those that are up wait for the others, so that all map
each other at once. A state machine driven by events: it knows no process, no clock and no channel.
"""

import itertools
from collections.abc import Callable

from tetrion.engine.executors.fleet.peer_mapping import PeerMapping
from tetrion.engine.messages import Command, Event, Failed, Loaded, LoadWeights, PeersMapped, Started


class BringUp:
    """`send(command, device_id)` queues a command for one worker; `reserve`, `host_memory`: see `PeerMapping`."""

    def __init__(
        self,
        device_ids: tuple[int, ...],
        send: Callable[[Command, int], None],
        reserve: Callable[[], None],
        *,
        shared_weights: bool,
        host_memory: bool,
    ) -> None:
        self.weights_bytes = 0
        self.refusal = ""
        """What is wrong with a checkpoint, as a worker has found: it says so of all that are to come up."""
        self._send = send
        self._ids = itertools.count(1)
        self._peers = PeerMapping(send, reserve, self._ids, host_memory=host_memory)
        self._awaited_at_start = set(device_ids)
        self._started: set[int] = set()
        self._waiting: set[int] = set()
        self._loading: dict[int, int] = {}
        self._publisher: int | None = None
        self._published = not shared_weights
        self._ready: list[int] = []
        self._failed: dict[int, str] = {}

    @property
    def device_uuids(self) -> dict[int, str]:
        """UUID of the GPU of each GPU worker that has started, by device id."""
        return self._peers.device_uuids

    @property
    def mapping(self) -> frozenset[int]:
        """Workers that are to map or unmap others' slabs, and have not said that they have."""
        return self._peers.asked

    def lost(self, device_id: int) -> None:
        """The worker is gone; what it was to answer it will not."""
        self._started.discard(device_id)
        self._waiting.discard(device_id)
        self._loading.pop(device_id, None)
        self._failed.pop(device_id, None)
        self._peers.lost(device_id)
        if device_id == self._publisher:
            self._publisher = None
        self._load()

    def unmap(self, device_id: int) -> None:
        """Make the others let go of a dead worker's slab, while all are idle; then `take_unmapped` names it."""
        self._peers.unmap(device_id)

    def handle(self, event: Event) -> bool:
        """Take an event that belongs here; False for one that does not."""
        match event:
            case Started():
                self._on_started(event)
            case Loaded():
                self._on_loaded(event)
            case Failed() if event.command_id == self._loading.get(event.device_id):
                self._failed[event.device_id] = f"it could not load the model: {event.message}"
                if event.kind == "checkpoint":
                    self.refusal = event.message
            case PeersMapped() | Failed():
                if not self._peers.handle(event):
                    return False
            case _:
                return False
        self._load()
        return True

    def take_ready(self) -> list[int]:
        """Workers that have come up since the last call."""
        ready, self._ready = self._ready, []
        return ready

    def take_failed(self) -> dict[int, str]:
        """Workers that live but cannot come up, with the reason, since the last call."""
        failed, self._failed = self._failed | self._peers.take_failed(), {}
        return failed

    def take_unmapped(self) -> list[int]:
        """Dead workers in whose place others may be started, since the last call."""
        return self._peers.take_unmapped()

    def _on_started(self, event: Started) -> None:
        if event.slab is not None:
            self._peers.started(event.slab)
        self._started.add(event.device_id)
        self._awaited_at_start.discard(event.device_id)
        if not self._awaited_at_start:
            started, self._started = self._started, set()
            self._peers.add(started)

    def _on_loaded(self, event: Loaded) -> None:
        self.weights_bytes = max(self.weights_bytes, event.weights_bytes)
        del self._loading[event.device_id]
        self._ready.append(event.device_id)
        if event.device_id == self._publisher:
            self._publisher, self._published = None, True

    def _load(self) -> None:
        """Tell those that wait to load; only one of them if the shared weights are still to be filled in."""
        self._waiting |= set(self._peers.take_done())
        chosen = sorted(self._waiting)
        if not self._published:
            chosen = [] if self._publisher is not None else chosen[:1]
            self._publisher = chosen[0] if chosen else self._publisher
        self._waiting -= set(chosen)
        for device_id in chosen:
            self._loading[device_id] = next(self._ids)
            publish = device_id == self._publisher
            self._send(LoadWeights(command_id=self._loading[device_id], publish=publish), device_id)
