"""What the loop itself costs: CPU time for each command, and device time that was lost while a request was ready.

A device-second is *lost* when the device is idle while some admitted request has work left and none of its commands
runs. It counts as *held* if the policy left it idle on purpose (`RoundPlan.num_held`). What remains is the engine's:
the time between the end of one command and the start of the next.

The times are those that workers report, so they arrive late and in no order. Every change is therefore kept until
nothing older can come any more, that is until the oldest unanswered command was sent, and summed up then.
"""

import time
from collections.abc import Callable

import msgspec

from tetrion.engine.loop.tenant_statistics import TenantStatistics

SETTLE_AT = 256
"""So many changes are kept before what can be summed up is."""


class LoopFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Sums since the loop began. `device_s`: usable devices × time; `lost_s` and `held_s`: see above, `held_s` being
    part of `lost_s`; `cpu_s`: CPU time of the loop's ticks, outside of which answers are read from rings and pictures
    are copied; `num_commands` answered by all of their members."""

    num_ticks: int
    num_commands: int
    cpu_s: float
    device_s: float
    lost_s: float
    held_s: float

    @property
    def lost_share(self) -> float:
        """Share of the device time that was lost and not held."""
        return (self.lost_s - self.held_s) / self.device_s if self.device_s else 0.0

    @property
    def cpu_s_per_command(self) -> float:
        return self.cpu_s / self.num_commands if self.num_commands else 0.0


class LoopStatistics:
    """Told by the loop what happens; all times are seconds on the executor's clock."""

    def __init__(self, num_devices: int, now_s: float, cpu_clock: Callable[[], float] = time.thread_time) -> None:
        self._cpu_clock = cpu_clock
        self.tenants = TenantStatistics()
        self._num_ticks = self._num_commands = 0
        self._cpu_s = self._device_s = self._lost_s = self._held_s = 0.0
        self._sent: dict[int, _Sent] = {}
        self._changes: list[tuple[float, int, int, int, int]] = []
        self._given = (num_devices, 0)
        self._settled_s = now_s
        self._devices, self._busy, self._ready, self._held = num_devices, 0, 0, 0

    def begin_tick(self) -> float:
        """What `end_tick` is to be given."""
        return self._cpu_clock()

    def end_tick(self, begun: float) -> None:
        self._num_ticks += 1
        self._cpu_s += self._cpu_clock() - begun

    def admitted(self, now_s: float) -> None:
        """A request has become ready."""
        self._changes.append((now_s, 0, 0, 1, 0))

    def ended(self, now_s: float) -> None:
        """A request that was ready is no more: it is finished, or has failed. To be told together with the answer to
        its last command, if there is one."""
        self._changes.append((now_s, 0, 0, -1, 0))

    def planned(self, num_devices: int, num_held: int, now_s: float) -> None:
        """From now on so many devices are usable, and the policy leaves so many idle on purpose."""
        devices, held = self._given
        if (num_devices, num_held) != (devices, held):
            self._changes.append((now_s, num_devices - devices, 0, 0, num_held - held))
            self._given = (num_devices, num_held)
        if len(self._changes) > SETTLE_AT:
            self._settle(now_s)

    def sent(self, command_id: int, members: tuple[int, ...], now_s: float) -> None:
        """A command of a ready request was given to its members."""
        self._sent[command_id] = _Sent(len(members), now_s)

    def answered(self, command_id: int, started_s: float, ended_s: float) -> None:
        """A member has executed the command. With the last one its request is ready again."""
        command = self._sent.get(command_id)
        if command is None:
            return
        command.starts_s.append(started_s)
        command.ends_s.append(ended_s)
        if len(command.ends_s) == command.num_members:
            del self._sent[command_id]
            self._num_commands += 1
            self._executed(command)

    def _executed(self, command: "_Sent") -> None:
        """From each member's start to its end a device was busy, from the first start to the last end the request was.
        Members that report the same time are one change."""
        starts_s = [max(time_s, command.sent_s) for time_s in command.starts_s]
        ends_s = [max(time_s, command.sent_s) for time_s in command.ends_s]
        first_s, last_s = min(starts_s), max(ends_s)
        self._changes += [(t, 0, starts_s.count(t), -1 if t == first_s else 0, 0) for t in set(starts_s)]
        self._changes += [(t, 0, -ends_s.count(t), 1 if t == last_s else 0, 0) for t in set(ends_s)]

    def failed(self, command_id: int, now_s: float) -> None:
        """A member brings no result: it is taken to have been busy since the command was sent."""
        command = self._sent.get(command_id)
        if command is not None:
            self.answered(command_id, command.sent_s, now_s)

    def figures(self, now_s: float) -> LoopFigures:
        """The sums as far as they are known."""
        self._settle(now_s)
        return LoopFigures(
            num_ticks=self._num_ticks,
            num_commands=self._num_commands,
            cpu_s=self._cpu_s,
            device_s=self._device_s,
            lost_s=self._lost_s,
            held_s=self._held_s,
        )

    def _settle(self, now_s: float) -> None:
        """Sum up until the oldest unanswered command was sent: what comes later is not complete."""
        until_s = next((command.sent_s for command in self._sent.values()), now_s)
        self._changes.sort()
        num_due = 0
        for time_s, devices, busy, ready, held in self._changes:
            if time_s > until_s:
                break
            self._advance(time_s)
            self._devices += devices
            self._busy += busy
            self._ready += ready
            self._held += held
            num_due += 1
        del self._changes[:num_due]
        self._advance(until_s)

    def _advance(self, time_s: float) -> None:
        span_s = time_s - self._settled_s
        if span_s <= 0:
            return
        self._settled_s = time_s
        self._device_s += span_s * self._devices
        idle = self._devices - self._busy
        if self._ready > 0 and idle > 0:
            self._lost_s += span_s * idle
            self._held_s += span_s * min(idle, self._held)


class _Sent:
    """A command that members have yet to answer."""

    __slots__ = ("ends_s", "num_members", "sent_s", "starts_s")

    def __init__(self, num_members: int, now_s: float) -> None:
        self.num_members = num_members
        self.sent_s = now_s
        self.starts_s: list[float] = []
        self.ends_s: list[float] = []
