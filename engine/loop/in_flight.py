"""Commands that devices have been given and not yet answered, and when they are predicted to end."""

from collections import deque
from collections.abc import Iterator, Sequence

from tetrion.engine.messages import StageCommand

MAX_DEPTH = 2
"""Commands a device may hold: the one that runs and the one planned ahead."""
OVERDUE_FACTOR, OVERDUE_S = 10, 1.0
"""An answer that comes so many times its prediction, and so many seconds, late is overdue."""


class InFlight:
    """One dispatched command. `pending` are the members that have not answered yet; at `num_behind` of them another
    command comes first. It is predicted to run from `start_s` to `end_s`, and may take `grace_s` longer.
    `is_cut_off`: a member has failed or is lost."""

    __slots__ = (
        "command",
        "duration_s",
        "end_s",
        "grace_s",
        "is_cut_off",
        "members",
        "num_behind",
        "pending",
        "start_s",
    )

    def __init__(self, command: StageCommand, members: tuple[int, ...], start_s: float, duration_s: float) -> None:
        self.command = command
        self.members = members
        self.pending = set(members)
        self.num_behind = 0
        self.duration_s = duration_s
        self.grace_s = 0.0
        self.is_cut_off = False
        self.starts_at(start_s)

    def starts_at(self, start_s: float) -> None:
        self.start_s = start_s
        self.end_s = start_s + self.duration_s

    def expected_end_s(self, now_s: float) -> float:
        """What is late is expected to take as long again as it has been late: the longer nothing is heard of a device,
        the less is planned for it."""
        return self.end_s if self.end_s >= now_s else now_s + (now_s - self.end_s)

    @property
    def overdue_s(self) -> float:
        """From then on an answer is overdue."""
        return self.end_s + OVERDUE_FACTOR * self.duration_s + OVERDUE_S + self.grace_s

    def ends_by(self, time_s: float) -> None:
        """A member has answered then. Members end together, so the others are about to, whatever was predicted: a plan
        made between two of the answers must not take them to be busy."""
        self.end_s = min(self.end_s, time_s)


class InFlightTable:
    """Per device the commands it holds in FIFO order; per request those that belong to it. Knows no planner.

    `devices`: those that may be given commands, as far as their past goes (see recovery.py).
    """

    def __init__(self, device_ids: tuple[int, ...]) -> None:
        self.devices = frozenset(device_ids)
        self._by_id: dict[int, InFlight] = {}
        self._by_device: dict[int, deque[InFlight]] = {device_id: deque() for device_id in device_ids}
        self._by_request: dict[str, list[InFlight]] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[InFlight]:
        return iter(self._by_id.values())

    def add(self, command: StageCommand, members: tuple[int, ...], now_s: float, duration_s: float) -> InFlight:
        entry = InFlight(command, members, max([self.free_s(member, now_s) for member in members]), duration_s)
        self._by_id[command.command_id] = entry
        self._by_request.setdefault(command.request_id, []).append(entry)
        for member in members:
            queue = self._by_device[member]
            entry.num_behind += bool(queue)
            queue.append(entry)
        return entry

    def free_s(self, device_id: int, now_s: float) -> float:
        """When the device's last command is expected to end; never before now."""
        free_s = now_s
        for entry in self._by_device[device_id]:
            free_s = max(free_s, entry.expected_end_s(now_s))
        return free_s

    def has_room(self, device_id: int) -> bool:
        return len(self._by_device[device_id]) < MAX_DEPTH

    def of_device(self, device_id: int) -> Sequence[InFlight]:
        """What the device holds, in the order in which it comes to it."""
        return tuple(self._by_device[device_id])

    def allow(self, seconds: float) -> None:
        """Nothing that is in flight is blamed for these: nobody could have answered, or been heard."""
        for entry in self._by_id.values():
            entry.grace_s += seconds

    def of_request(self, request_id: str) -> Sequence[InFlight]:
        """In the order in which they were dispatched."""
        return self._by_request.get(request_id, ())

    def request_ids(self) -> frozenset[str]:
        """Requests that have commands here."""
        return frozenset(self._by_request)

    def answer(self, command_id: int, device_id: int, now_s: float) -> InFlight | None:
        """A member has answered. Returns the entry (done when nobody is pending), None if no answer was due."""
        entry = self._by_id.get(command_id)
        if entry is None or device_id not in entry.pending:
            return None
        entry.pending.discard(device_id)
        queue = self._by_device[device_id]
        if queue[0] is entry:
            queue.popleft()
            self._move_up(queue, now_s)
        else:
            queue.remove(entry)
            entry.num_behind -= 1
        if entry.pending:
            entry.ends_by(now_s)
        else:
            self._forget(entry)
        return entry

    def _move_up(self, queue: deque[InFlight], now_s: float) -> None:
        """A device has come to its next command, which starts now if it was the last member to."""
        if queue:
            queue[0].num_behind -= 1
            if not queue[0].num_behind:
                queue[0].starts_at(now_s)

    def _forget(self, entry: InFlight) -> None:
        del self._by_id[entry.command.command_id]
        others = self._by_request[entry.command.request_id]
        others.remove(entry)
        if not others:
            del self._by_request[entry.command.request_id]

    def drop_device(self, device_id: int, now_s: float) -> list[InFlight]:
        """The device is gone: it answers nothing more. Returns the entries it was a pending member of."""
        self.devices -= {device_id}
        lost = list(self._by_device[device_id])
        for entry in lost:
            entry.is_cut_off = True
            self.answer(entry.command.command_id, device_id, now_s)
        return lost

    def add_device(self, device_id: int) -> bool:
        """The device may be given commands. False if it could be before."""
        is_new = device_id not in self.devices
        self.devices |= {device_id}
        return is_new
