"""Devices that fall silent: the real loop on simulated devices that are stopped and go on.

A device that wakes goes on where it stood, and may write whatever the commands that it holds let it write: its
requests' slots, and of a group's command the other members' regions. `StoppingExecutor` looks at each wake whether
anybody uses these by then.
"""

import math
import random
from collections.abc import Collection

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.loop.test_loop import COSTS, Simulation
from tetrion.engine.executors.simulated import SimulatedExecutor, _result, _source
from tetrion.engine.loop.loop import EngineLoop
from tetrion.engine.messages import Command, Decode, Denoise, EncodePrompt, ResetBarriers, StageCommand
from tetrion.engine.request import MAX_ATTEMPTS

STALL_TIMEOUT_S = 20.0


class StoppingExecutor(SimulatedExecutor):
    """`stop` makes a device do nothing for a while, not even die of its own accord."""

    loop: EngineLoop

    def __init__(self, num_devices: int, respawn_s: float = 0.5) -> None:
        super().__init__(COSTS, num_devices, respawn_s=respawn_s)
        self.wakes_s: dict[int, float] = {}
        self.killed: dict[int, list[float]] = {device_id: [] for device_id in self.device_ids}
        self.given: dict[int, list[float]] = {device_id: [] for device_id in self.device_ids}
        self.used_meanwhile: list[str] = []
        self.num_stops = 0
        self._groups_since: dict[int, set[int]] = {}
        """Devices that have been in a group since another was stopped, by the stopped one."""
        self._image_slots: set[int] = set()
        self._made: set[tuple[int, int]] = set()
        self._stopped_holding: dict[int, list[StageCommand]] = {}
        self._begun_at_stop: dict[int, list[StageCommand]] = {}

    def is_stopped(self, device_id: int) -> bool:
        return self.now_s() < self.wakes_s.get(device_id, -math.inf)

    def stop(self, device_id: int, for_s: float) -> None:
        if device_id in self.alive and not self.is_stopped(device_id):
            self.num_stops += 1
            self.wakes_s[device_id] = self.now_s() + for_s
            self._groups_since[device_id] = set()
            held = self._stopped_holding[device_id] = list(self._unanswered[device_id].values())
            self._begun_at_stop[device_id] = [command for command in held if self._has_begun(command)]
            if for_s < math.inf:
                self.at(self.wakes_s[device_id], lambda: self._wake_up(device_id))

    def _has_begun(self, command: StageCommand) -> bool:
        """All members of a group have come to it: before that none writes to another."""
        members = getattr(command, "members", ())
        return all(next(iter(self._unanswered[member].values()), None) is command for member in members)

    def _wake_up(self, device_id: int) -> None:
        if device_id not in self._stopped_holding:
            return  # it was killed
        for command in self._stopped_holding.pop(device_id):
            is_due = any(
                entry.command.command_id == command.command_id
                for entry in self.loop._in_flight.of_request(command.request_id)
            )
            owners = [other for other in self.loop.table.admitted() if other.slot == command.slot]
            if owners and not is_due:
                self.used_meanwhile.append(f"slot {command.slot} by {owners[0].request_id}")
            if isinstance(command, Decode) and not is_due and command.image_slot not in self._image_slots:
                self.used_meanwhile.append(f"image slot {command.image_slot}")
            others = set(getattr(command, "members", ())) - {device_id}
            if command in self._begun_at_stop[device_id] and others & self._groups_since[device_id]:
                self.used_meanwhile.append(f"regions of {others}")

    def submit(self, command: Command, members: tuple[int, ...]) -> bool:
        for device_id in members:
            self.given[device_id].append(self.now_s())
        if isinstance(command, ResetBarriers) and self.is_stopped(members[0]):
            if self.wakes_s[members[0]] < math.inf:
                self.at(self.wakes_s[members[0]], lambda: self._reset_late(command, members))
            return True
        return super().submit(command, members)

    def _reset_late(self, command: ResetBarriers, members: tuple[int, ...]) -> None:
        if members[0] in self.alive:
            super().submit(command, members)

    def _complete(self, ticket: int, command: StageCommand, members: tuple[int, ...], start_s: float) -> None:
        stopped = [member for member in members if self.is_stopped(member)]
        queues = [list(self._unanswered[member].values()) for member in members]
        waits = any(command in queue[1:] for queue in queues)
        waits |= not isinstance(command, EncodePrompt) and _source(command) not in self._made
        if not stopped and waits:
            self.at(self.now_s() + 0.05, lambda: self._complete(ticket, command, members, start_s))
        elif not stopped:
            self._made.add(_result(command))
            is_done = all(command in queue for queue in queues)  # it was not aborted
            for device_id in self._groups_since.keys() - set(members):
                self._groups_since[device_id] |= set(members) if len(members) > 1 and is_done else set()
            super()._complete(ticket, command, members, start_s)
        elif (wakes_s := max(self.wakes_s[member] for member in stopped)) < math.inf:
            self.at(wakes_s, lambda: self._complete(ticket, command, members, start_s))

    def abort(self, device_ids: Collection[int]) -> None:
        super().abort([device_id for device_id in device_ids if not self.is_stopped(device_id)])
        for device_id in device_ids:
            if self.is_stopped(device_id) and self.wakes_s[device_id] < math.inf:
                self.at(self.wakes_s[device_id], lambda device_id=device_id: self._abort_late(device_id))

    def _abort_late(self, device_id: int) -> None:
        if device_id in self.alive:
            super().abort([device_id])

    def kill(self, device_id: int, reason: str) -> None:
        if device_id in self.alive:
            self.killed[device_id].append(self.now_s())
        super().kill(device_id, reason)

    def lose(self, device_id: int) -> None:
        super().lose(device_id)
        self.wakes_s.pop(device_id, None)
        self._stopped_holding.pop(device_id, None)

    def acquire_image_slot(self) -> int | None:
        slot = next(number for number in range(100) if number not in self._image_slots)
        self._image_slots.add(slot)
        return slot

    def release_image_slot(self, image_slot: int) -> None:
        self._image_slots.remove(image_slot)


def simulation_of(num_devices: int, **config: object) -> tuple[Simulation, StoppingExecutor]:
    executor = StoppingExecutor(num_devices)
    simulation = Simulation(num_devices, executor=executor, stall_timeout_s=STALL_TIMEOUT_S, **config)
    executor.loop = simulation.loop
    return simulation, executor


def check(simulation: Simulation, executor: StoppingExecutor, num_requests: int) -> None:
    assert not executor.used_meanwhile
    assert len(simulation.results) + len(simulation.failures) == num_requests
    table = simulation.loop.table
    assert len(table) == 0 and table.slots.num_free + table.slots.num_withheld == table.slots.num_slots
    assert table.slots.num_withheld + len(executor._image_slots) == 0 or simulation.loop.recovery_figures.overdue


@settings(max_examples=1200, deadline=None)
@given(st.data())
def test_nothing_that_a_stopped_device_can_write_is_used_before_it_is_gone(data: st.DataObject) -> None:
    num_devices = data.draw(st.integers(1, 4))
    simulation, executor = simulation_of(num_devices, max_inflight=data.draw(st.sampled_from([2, 3, 64])))
    draw = random.Random(data.draw(st.integers(0, 10**6)))
    for number in range(10):
        size = draw.choice((128, 256, 512))
        simulation.request(f"r{number}", at_s=0.7 * number, width=size, height=size, num_steps=12)
    stops = st.tuples(st.floats(0, 9), st.integers(0, num_devices - 1), st.sampled_from([0.3, 2.0, 6.0, 15.0, 40.0]))
    for at_s, device_id, for_s in data.draw(st.lists(stops, max_size=6)):
        executor.at(at_s, lambda device_id=device_id, for_s=for_s: executor.stop(device_id, for_s))
    simulation.run()
    check(simulation, executor, 10)
    assert simulation.failures == {} or executor.num_stops >= MAX_ATTEMPTS


def test_a_device_that_is_stopped_alone_is_left_alone_and_its_request_goes_on_elsewhere() -> None:
    simulation, executor = simulation_of(2)
    simulation.request("a", width=512, height=512, num_steps=40, force_degrees=(1,))
    executor.at(2.0, lambda: [executor.stop(d, 15.0) for d in executor.device_ids if executor._unanswered[d]])
    simulation.request("b", at_s=25.0, width=512, height=512, num_steps=40, force_degrees=(2,))
    simulation.run()
    check(simulation, executor, 2)
    figures = simulation.loop.recovery_figures
    assert (figures.num_stalls, figures.num_deaths, figures.num_retries, figures.overdue) == (1, 0, 1, ())
    undisturbed = Simulation(2)
    undisturbed.request("a", width=512, height=512, num_steps=40, force_degrees=(1,))
    undisturbed.run()
    longer_s = simulation.results["a"].latency_s - undisturbed.results["a"].latency_s
    assert longer_s < 5.0, "it waits for what is overdue, and does a chunk again"
    assert simulation.results["b"].degrees == (2,) * 40, "it is one of the others again"


def test_a_device_that_does_not_come_back_is_killed_after_the_timeout() -> None:
    simulation, executor = simulation_of(2)
    simulation.request("a", width=512, height=512, num_steps=40, force_degrees=(1,))
    executor.at(2.0, lambda: [executor.stop(d, math.inf) for d in executor.device_ids if executor._unanswered[d]])
    for number in range(30):
        simulation.request(f"b{number}", at_s=1.0 * number, num_steps=10)
    simulation.run()
    check(simulation, executor, 31)
    killed_s = [time_s for times_s in executor.killed.values() for time_s in times_s]
    assert len(killed_s) == 1 and 2.0 + STALL_TIMEOUT_S < killed_s[0] < 2.0 + STALL_TIMEOUT_S + 6.0
    assert all(result.latency_s < 12.0 for result in simulation.results.values())


def test_the_members_of_a_group_are_freed_and_the_stopped_one_is_killed_before_they_meet_again() -> None:
    simulation, executor = simulation_of(3)
    simulation.request("a", width=512, height=512, num_steps=40, force_degrees=(3,))
    executor.at(2.0, lambda: executor.stop(1, 30.0))
    simulation.run()
    check(simulation, executor, 1)
    assert list(map(len, executor.killed.values())) == [0, 1, 0] and executor.killed[1][0] < 2.0 + 6.0
    assert simulation.loop.recovery_figures.num_repeated_steps <= 4


def test_a_device_gets_nothing_new_while_it_is_overdue() -> None:
    simulation, executor = simulation_of(2)
    executor.at(1.0, lambda: executor.stop(1, 18.0))
    for number in range(20):
        simulation.request(f"{number}", at_s=0.5 * number, num_steps=12, force_degrees=(1,))
    simulation.run()
    check(simulation, executor, 20)
    assert not [time_s for time_s in executor.given[1] if 3.0 < time_s < 19.0]


def test_a_machine_that_stood_still_kills_nobody() -> None:
    """The engine and all devices stop at once, at any moment; the devices wake after the engine."""
    for number in range(20):
        simulation, executor = simulation_of(3)

        def stand_still(executor: StoppingExecutor = executor) -> None:
            executor._now_s += 60.0
            for device_id in executor.device_ids:
                executor.stop(device_id, 0.4)

        executor.at(0.3 + 0.1 * number, stand_still)
        for name in "abc":
            simulation.request(name, width=512, height=512, num_steps=12)
        simulation.run()
        check(simulation, executor, 3)
        figures = simulation.loop.recovery_figures
        assert (figures.num_deaths, figures.num_stalls, figures.num_retries) == (0, 0, 0)


def test_a_request_that_makes_every_device_fall_silent_fails_alone() -> None:
    simulation, executor = simulation_of(2)
    submit = executor.submit

    def poisoned(command: Command, members: tuple[int, ...]) -> bool:
        taken = submit(command, members)
        if isinstance(command, Denoise) and command.request_id == "poison":
            executor.at(executor.now_s() + 0.01, lambda: [executor.stop(member, math.inf) for member in members])
        return taken

    executor.submit = poisoned  # type: ignore[method-assign]
    simulation.request("poison", num_steps=12)
    for number in range(20):
        simulation.request(f"{number}", at_s=0.5 * number, num_steps=12)
    simulation.run()
    assert set(simulation.failures) == {"poison"} and len(simulation.results) == 20
    assert "no answer for" in str(simulation.failures["poison"])


@pytest.mark.parametrize("first_time_s", [0.0, 60.0])
def test_what_a_device_does_for_the_first_time_may_take_it_longer(first_time_s: float) -> None:
    """Once: a device that falls silent at what it has done before is overdue as ever."""
    simulation, executor = simulation_of(1)
    executor.first_time_s = first_time_s
    slow = {"encode", "denoise", "decode"}

    def duration(command: Command, seconds: float) -> float:
        assert isinstance(command, StageCommand)
        if command.stage in slow:
            slow.remove(command.stage)
            return seconds + 30.0
        return seconds

    executor._duration = duration
    simulation.request("a", num_steps=12)
    executor.at(200.0, lambda: executor.stop(0, math.inf))
    simulation.request("b", at_s=199.9, num_steps=100)
    simulation.run()
    check(simulation, executor, 2)
    assert len(executor.killed[0]) == 1 and executor.killed[0][0] > 200.0
    assert simulation.loop.recovery_figures.num_stalls == (1 if first_time_s else 4)


@pytest.mark.parametrize("occupied_s", [10.0, 60.0])
def test_a_device_that_is_occupied_otherwise_is_not_overdue_unless_it_never_ends(occupied_s: float) -> None:
    """It maps others' memory, for example: its commands wait for that."""
    simulation, executor = simulation_of(2)

    def occupy(device_id: int) -> None:
        executor.occupied |= {device_id}
        executor.stop(device_id, occupied_s)
        executor.at(executor.now_s() + occupied_s, lambda: setattr(executor, "occupied", frozenset()))

    simulation.request("a", width=512, height=512, num_steps=20, force_degrees=(2,))
    executor.at(1.0, lambda: occupy(1))
    simulation.run()
    check(simulation, executor, 1)
    figures = simulation.loop.recovery_figures
    assert (figures.num_stalls, figures.num_deaths) == ((0, 0) if occupied_s < STALL_TIMEOUT_S else (0, 1))


@pytest.mark.parametrize("times", [5, 20, 60])
@pytest.mark.parametrize("degree", [1, 2])
def test_a_machine_that_is_slower_than_predicted_by_far_fails_nobody(times: int, degree: int) -> None:
    """It reacts to aborts: it is slow, not silent."""
    simulation, executor = simulation_of(2)
    executor._duration = lambda _, seconds: seconds * times
    for number in range(4):
        simulation.request(f"{number}", at_s=1.0 * number, num_steps=12, force_degrees=(degree,))
    simulation.run()
    check(simulation, executor, 4)
    assert not simulation.failures and not simulation.loop.recovery_figures.num_deaths
