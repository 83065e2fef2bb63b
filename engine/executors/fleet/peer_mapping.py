"""Who reaches whose slab: makes GPU workers map each other's slabs, and forget those of the dead.

Workers on CPUs inherit all slabs; for them there is nothing to do. A GPU worker says at its start where its slab is.
Newcomers are taken in rounds, one at a time: each newcomer maps all slabs, the others map the newcomers'. If in the
very first round some GPU cannot reach another's memory, all slabs move to host memory, for good.

A worker that is already serving gets its `MapPeers` like any command, at its place in the queue: what is queued before
it ends without the newcomer, whom no group contains before the round is over. A dead worker's slab is unmapped before
another is started in its place, and only while all workers are idle: `unmap` is called by whoever knows that.
"""

import logging
from collections.abc import Callable, Collection, Iterator

from tetrion.engine.messages import Command, Failed, MapPeers, PeerSlab, PeersMapped, UnmapPeers

logger = logging.getLogger(__name__)


class _Round:
    """One `MapPeers` to everybody it concerns, and their answers."""

    def __init__(self, command_id: int, newcomers: set[int], asked: Collection[int]) -> None:
        self.command_id = command_id
        self.newcomers = newcomers
        self.pending = set(asked)
        self.reached: dict[int, frozenset[int]] = {}
        self.reasons: list[str] = []


class PeerMapping:
    """`send(command, device_id)` queues a command; `reserve` gives the slabs' files in host memory their size."""

    def __init__(
        self,
        send: Callable[[Command, int], None],
        reserve: Callable[[], None],
        command_ids: Iterator[int],
        *,
        host_memory: bool,
    ) -> None:
        self.host_memory = host_memory
        self._send, self._reserve, self._ids = send, reserve, command_ids
        self._slabs: dict[int, PeerSlab] = {}
        self._mapped: set[int] = set()
        self._waiting: set[int] = set()
        self._round: _Round | None = None
        self._unmapping: dict[int, tuple[int, set[int]]] = {}
        self._done: list[int] = []
        self._failed: dict[int, str] = {}
        self._unmapped: list[int] = []

    def started(self, slab: PeerSlab) -> None:
        """A GPU worker has started and has a slab."""
        self._slabs[slab.device_id] = slab

    @property
    def device_uuids(self) -> dict[int, str]:
        """GPU of each device that has a slab."""
        return {device_id: slab.device_uuid for device_id, slab in self._slabs.items()}

    @property
    def asked(self) -> frozenset[int]:
        """Workers that owe an answer."""
        pending = [pending for _, pending in self._unmapping.values()]
        return frozenset().union(self._round.pending if self._round else (), *pending)

    def add(self, newcomers: Collection[int]) -> None:
        """These workers are to reach all others, and to be reached by them."""
        self._waiting |= set(newcomers)
        self._start_round()

    def unmap(self, device_id: int) -> None:
        """Let go of a dead worker's slab. Only while all workers are idle."""
        slab = self._slabs.pop(device_id, None)
        asked = self._mapped | (self._round.newcomers if self._round else set())
        if slab is None or self.host_memory or not asked:
            self._unmapped.append(device_id)
            return
        command = UnmapPeers(command_id=next(self._ids), device_ids=(device_id,))
        self._unmapping[command.command_id] = (device_id, set(asked))
        for peer in sorted(asked):
            self._send(command, peer)

    def lost(self, device_id: int) -> None:
        """The worker is gone; what it was to answer it will not."""
        self._waiting.discard(device_id)
        self._mapped.discard(device_id)
        for command_id in list(self._unmapping):
            self._on_unmapped(command_id, device_id)
        if self._round is not None:
            self._round.newcomers.discard(device_id)
            self._round.pending.discard(device_id)
            self._end_round()

    def handle(self, event: PeersMapped | Failed) -> bool:
        """Take an answer to `MapPeers` or `UnmapPeers`; False for one that is not."""
        if event.command_id in self._unmapping:
            self._on_unmapped(event.command_id, event.device_id)
        elif self._round is not None and event.command_id == self._round.command_id:
            reached, reason = (event.mapped, event.reason) if isinstance(event, PeersMapped) else ((), event.message)
            self._round.pending.discard(event.device_id)
            self._round.reached[event.device_id] = frozenset(reached)
            self._round.reasons += [reason] if reason else []
            self._end_round()
        else:
            return isinstance(event, PeersMapped)  # to a round that was given up
        return True

    def take_done(self) -> list[int]:
        """Newcomers that reach all and are reached by all, since the last call."""
        done, self._done = self._done, []
        return done

    def take_failed(self) -> dict[int, str]:
        """Newcomers of whom that cannot be said, with the reason, since the last call."""
        failed, self._failed = self._failed, {}
        return failed

    def take_unmapped(self) -> list[int]:
        """Dead workers whose slab nobody maps any more, since the last call."""
        unmapped, self._unmapped = self._unmapped, []
        return unmapped

    def _start_round(self) -> None:
        if self._round is None and self._waiting:
            newcomers, self._waiting = self._waiting, set()
            if not self._slabs:  # on CPUs
                self._done += sorted(newcomers)
                return
            self._ask(newcomers)

    def _ask(self, newcomers: set[int]) -> None:
        command_id = next(self._ids)
        new = tuple(self._slabs[device_id] for device_id in sorted(newcomers))
        every = new + tuple(self._slabs[device_id] for device_id in sorted(self._mapped))
        commands = {}
        if self.host_memory:
            new = every = ()
        else:
            for peer in self._mapped:
                commands[peer] = MapPeers(command_id=command_id, slabs=new, host_memory=False)
        for newcomer in newcomers:
            commands[newcomer] = MapPeers(command_id=command_id, slabs=every, host_memory=self.host_memory)
        self._round = _Round(command_id, newcomers, commands)
        for device_id in sorted(commands):
            self._send(commands[device_id], device_id)

    def _end_round(self) -> None:
        """If all have answered: the newcomers are in, or out, or everybody moves to host memory."""
        if self._round is None or self._round.pending:
            return
        ended, self._round = self._round, None
        members = self._mapped | ended.newcomers
        reason = "; ".join(ended.reasons)
        if all(members <= reached for device_id, reached in ended.reached.items() if device_id in members):
            self._mapped |= ended.newcomers
            self._done += sorted(ended.newcomers)
        elif not self.host_memory and not self._mapped:
            self._move_to_host_memory(ended.newcomers, reason)
        else:
            self._failed |= dict.fromkeys(ended.newcomers, f"its slab cannot be mapped: {reason}")
        self._start_round()

    def _move_to_host_memory(self, newcomers: set[int], reason: str) -> None:
        logger.warning("the exchange goes through host memory: %s", reason)
        try:
            self._reserve()
        except OSError as error:
            self._failed |= dict.fromkeys(newcomers, f"{reason}; host memory in place of it: {error}")
            return
        self.host_memory = True
        self._ask(newcomers)

    def _on_unmapped(self, command_id: int, peer: int) -> None:
        device_id, pending = self._unmapping[command_id]
        pending.discard(peer)
        if not pending:
            del self._unmapping[command_id]
            self._unmapped.append(device_id)
