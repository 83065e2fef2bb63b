"""Commands that devices have been given and not yet answered, and when they are predicted to end."""

from collections import deque
from collections.abc import Iterator

from tetrion.engine.messages import GroupCommand

MAX_DEPTH = 2
"""Commands a device may hold: the one that runs and the one planned ahead."""


class InFlight:
    """One dispatched command. `pending` are the members that have not answered yet."""

    __slots__ = ("command", "duration_s", "members", "pending", "start_s")

    def __init__(self, command: GroupCommand, members: tuple[int, ...], start_s: float, duration_s: float) -> None:
        self.command = command
        self.members = members
        self.pending = set(members)
        self.start_s = start_s
        self.duration_s = duration_s

    @property
    def end_s(self) -> float:
        return self.start_s + self.duration_s


class InFlightTable:
    """Per device the commands it holds in FIFO order; per request those that belong to it. Knows no planner."""

    def __init__(self, device_ids: tuple[int, ...]) -> None:
        self._by_id: dict[int, InFlight] = {}
        self._by_device: dict[int, deque[InFlight]] = {device_id: deque() for device_id in device_ids}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[InFlight]:
        return iter(self._by_id.values())

    def add(self, command: GroupCommand, members: tuple[int, ...], now_s: float, duration_s: float) -> None:
        start_s = max([now_s, *(self.free_s(member, now_s) for member in members)])
        entry = InFlight(command, members, start_s, duration_s)
        self._by_id[command.command_id] = entry
        for member in members:
            self._by_device[member].append(entry)

    def free_s(self, device_id: int, now_s: float) -> float:
        """When the device's last command is predicted to end; never before now if it holds any."""
        free_s = now_s if not self._by_device[device_id] else 0.0
        for entry in self._by_device[device_id]:
            free_s = max(free_s, now_s, entry.end_s)
        return free_s

    def has_room(self, device_id: int) -> bool:
        return len(self._by_device[device_id]) < MAX_DEPTH

    def of_request(self, request_id: str) -> list[InFlight]:
        return [entry for entry in self._by_id.values() if entry.command.request_id == request_id]

    def answer(self, command_id: int, device_id: int, now_s: float) -> InFlight | None:
        """A member has answered. Returns the entry (done when nobody is pending), None if no answer was due."""
        entry = self._by_id.get(command_id)
        if entry is None or device_id not in entry.pending:
            return None
        entry.pending.discard(device_id)
        queue = self._by_device[device_id]
        queue.remove(entry)
        if queue and all(self._by_device[member][0] is queue[0] for member in queue[0].pending):
            queue[0].start_s = now_s
        if not entry.pending:
            del self._by_id[command_id]
        return entry

    def drop_device(self, device_id: int, now_s: float) -> list[InFlight]:
        """The device is gone: it answers nothing more. Returns the entries it was a pending member of."""
        lost = list(self._by_device[device_id])
        for entry in lost:
            self.answer(entry.command.command_id, device_id, now_s)
        return lost
