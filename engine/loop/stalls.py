"""Devices that do not answer: which are overdue, and what they may still write to.

A device that is overdue may be dead, stopped or slow, and one that wakes carries on where it stood. What it can reach
must not be used again before it has answered or is gone:

* of a command of its own alone: the request's slot (there and in host memory) and the slot of its picture. They are
  withheld, and the device is left alone for a while: it may come back;
* of a group's command: also regions of the other members. Nothing can be withheld of those, so it is killed.

Owns who is overdue since when, and what is withheld for it; recovery.py decides what follows.
"""

import msgspec

from tetrion.engine.executors.base import Executor
from tetrion.engine.loop.in_flight import InFlight, InFlightTable
from tetrion.engine.loop.progress import Answer, Bookkeeper
from tetrion.engine.loop.request_table import RequestTable
from tetrion.engine.loop.requests import Request
from tetrion.engine.messages import Failed, StageCommand

MAX_DOUBLINGS = 6
FirstTime = tuple[str, object, int]
"""Stage, parameters' shape and degree."""


class Overdue(msgspec.Struct):
    """A device that was set aside. `owed`: commands that it has not answered, by id; `blamed`: whose command it was
    at."""

    since_s: float
    owed: dict[int, StageCommand]
    blamed: Request | None


class Stalls:
    def __init__(self, executor: Executor, in_flight: InFlightTable, table: RequestTable, books: Bookkeeper) -> None:
        self._executor, self._in_flight, self._table, self._books = executor, in_flight, table, books
        self._overdue: dict[int, Overdue] = {}
        self._occupied_s: dict[int, float] = {}
        """Since when devices have been occupied otherwise."""
        self._met: dict[int, set[FirstTime]] = {}
        """What each device has done since it was started: the first time may take it longer."""

    @property
    def devices(self) -> frozenset[int]:
        """Those that were set aside, and have neither answered nor died since."""
        return frozenset(self._overdue)

    def sent(self, entry: InFlight) -> None:
        """A device may need time to prepare for what it has never done; and what was overdue before is waited for twice
        as long each time: the machine may be slower than is predicted, and not the device silent."""
        request = self._table.get(entry.command.request_id)
        if request is not None and request.num_stalls:
            entry.grace_s += (patience(request) - 1) * (entry.overdue_s - entry.end_s)
        if any(_first_time(entry) not in self._met.get(member, ()) for member in entry.members):
            entry.grace_s += self._executor.first_time_s

    def executed(self, entry: InFlight, device_id: int) -> None:
        self._met.setdefault(device_id, set()).add(_first_time(entry))

    def silent(self, now_s: float) -> list[tuple[int, InFlight]]:
        """Devices with the command that they are at, whose answer is overdue. Not those that wait for a member which
        has not come to it, or which is dead and about to be reported lost; nor those that are occupied otherwise, and
        whoever waits for these: their time begins when that is over."""
        alive, silent = self._executor.alive, []
        occupied = self._executor.occupied & alive
        self._occupied_s = {device_id: self._occupied_s.get(device_id, now_s) for device_id in occupied}
        for device_id in occupied:
            for entry in self._in_flight.of_device(device_id)[:1]:
                entry.starts_at(now_s)
        for device_id in sorted(self._in_flight.devices & alive):
            for entry in self._in_flight.of_device(device_id)[:1]:
                if now_s > entry.overdue_s and not entry.num_behind and entry.pending <= alive:
                    silent.append((device_id, entry))
        return silent

    def for_too_long(self, now_s: float, timeout_s: float) -> list[int]:
        """Devices that were set aside so long ago, or have been occupied otherwise since then."""
        since_s = {device_id: overdue.since_s for device_id, overdue in self._overdue.items()} | self._occupied_s
        return [device_id for device_id, time_s in since_s.items() if now_s > time_s + timeout_s]

    def set_aside(self, device_id: int, entries: list[InFlight], now_s: float) -> None:
        """The device gets nothing new. `entries`: what it was given alone; their slots are withheld. The first one's
        request is blamed, until the device answers."""
        owed = {entry.command.command_id: entry.command for entry in entries}
        self._overdue[device_id] = Overdue(now_s, owed, self._table.get(entries[0].command.request_id))
        for entry in entries:
            self._table.slots.withhold(entry.command.slot)

    def answered(self, event: Answer | Failed) -> bool:
        """A device has answered what it is not asked for any more. Returns whether it was set aside, and has answered
        everything now."""
        overdue = self._overdue.get(event.device_id)
        if overdue is None or event.command_id not in overdue.owed:
            return False
        self._release(overdue.owed.pop(event.command_id))
        if not overdue.owed:
            del self._overdue[event.device_id]
            if overdue.blamed is not None:
                overdue.blamed.attempts -= 1
        return not overdue.owed

    def lost(self, device_id: int) -> None:
        """The device is gone: it writes nothing any more."""
        self._met.pop(device_id, None)
        overdue = self._overdue.pop(device_id, None)
        if overdue is not None:
            for command in overdue.owed.values():
                self._release(command)

    def allow(self, seconds: float) -> None:
        """The engine itself has stood still for so long."""
        for overdue in self._overdue.values():
            overdue.since_s += seconds
        self._occupied_s = {device_id: since_s + seconds for device_id, since_s in self._occupied_s.items()}

    def _release(self, command: StageCommand) -> None:
        self._books.discard(command)
        self._table.slots.give_back(command.slot)


def patience(request: Request) -> int:
    """How many times as long as usual is waited for an answer."""
    return int(2 ** min(request.num_stalls, MAX_DOUBLINGS))


def _first_time(entry: InFlight) -> FirstTime:
    command = entry.command
    return command.stage, (command.params.model, command.params.shape), len(entry.members)
