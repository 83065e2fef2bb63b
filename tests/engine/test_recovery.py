"""The recovery protocol: whatever dies, and whenever, two devices that meet in a group have counted the same.

The real loop on simulated devices that also keep what real ones keep of each other: at each end a count of the barriers
passed with a peer, and in each slab a counter per peer (engine/parallel/barrier.py). A device that dies leaves its slab
as it is. One that is aborted writes on for a while, and answers late, unless it is reset before; so does one that is
told to reset.
"""

import random
from collections import Counter
from collections.abc import Collection
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.test_loop import COSTS, SPEC, Simulation
from tetrion.engine.messages import BarriersReset, Command, Denoise, ResetBarriers
from tetrion.engine.request import GenerationError, ImageRequest
from tetrion.engine.resolve import resolve_request
from tetrion.engine.simulated import SimulatedCommand, SimulatedExecutor


class CountingExecutor(SimulatedExecutor):
    """`draw` decides how many barriers a chunk passes before it is cut off, and how late answers are."""

    def __init__(self, num_devices: int, draw: random.Random, respawn_s: float | None) -> None:
        super().__init__(COSTS, num_devices, lambda _, seconds: seconds * draw.uniform(0.7, 1.4), respawn_s)
        self.counts: Counter[tuple[int, int]] = Counter()
        self.counters: Counter[tuple[int, int]] = Counter()
        self.disagreements: list[tuple[int, int]] = []
        self.num_groups = 0
        self.joined: list[int] = []
        self._draw = draw
        self._life = Counter[int]()
        self._aborts: dict[int, object] = {}

    def submit(self, command: Command, members: tuple[int, ...]) -> bool:
        if isinstance(command, Denoise):
            for me in members:
                self.at(max(self.now_s(), self._free_s[me]), lambda me=me: self._enter(me, command))
        if not isinstance(command, ResetBarriers):
            return super().submit(command, members)
        (device_id,) = members
        life = self._life[device_id]
        self._free_s[device_id] = max(self._free_s[device_id], self.now_s()) + self._draw.choice([0.0, 0.01, 1.0])
        self.at(self._free_s[device_id], lambda: self._reset(command, device_id, life))
        return True

    def abort(self, device_ids: Collection[int]) -> None:
        for device_id in set(device_ids) - self._aborts.keys():
            abort = self._aborts[device_id] = object()
            self.at(self.now_s() + self._draw.choice([0.0, 0.02, 0.5]), lambda d=device_id, a=abort: self._stop(d, a))

    def lose(self, device_id: int) -> None:
        if device_id in self.alive:
            self._pass_some_barriers(device_id)
            super().lose(device_id)
            self._end_life(device_id)

    def _return(self, device_id: int) -> None:
        super()._return(device_id)
        self.joined.append(device_id)
        for peer in self.device_ids:
            self.counts[device_id, peer] = 0

    def _end_life(self, device_id: int) -> None:
        self._life[device_id] += 1
        self._aborts.pop(device_id, None)

    def _stop(self, device_id: int, abort: object) -> None:
        if self._aborts.get(device_id) is abort:
            self._pass_some_barriers(device_id)
            del self._aborts[device_id]
            super().abort([device_id])

    def _reset(self, command: ResetBarriers, device_id: int, life: int) -> None:
        if life != self._life[device_id]:
            return
        self._aborts.pop(device_id, None)
        for peer in self.device_ids:
            self.counts[device_id, peer] = self.counters[device_id, peer] = 0
        self._events.append(BarriersReset(command_id=command.command_id, device_id=device_id))

    def _complete(self, ticket: int, command: SimulatedCommand, members: tuple[int, ...], start_s: float) -> None:
        if isinstance(command, Denoise) and all(ticket in self._unanswered[m] for m in members):
            self.num_groups += len(members) > 1
            for a, b in combinations(members, 2):
                if len({self.counts[a, b], self.counts[b, a], self.counters[a, b], self.counters[b, a]}) > 1:
                    self.disagreements.append((a, b))
                for me, peer in ((a, b), (b, a)):
                    self._arrive(me, peer, 40 * command.chunk_steps)
        super()._complete(ticket, command, members, start_s)

    def _enter(self, device_id: int, command: Denoise) -> None:
        """Arrive at the chunk's first barrier, as soon as the device has come to it, whether or not the others have."""
        if any(held is command for held in self._unanswered[device_id].values()):
            for peer in set(command.members) - {device_id}:
                self._arrive(device_id, peer, 1)

    def _pass_some_barriers(self, device_id: int) -> None:
        """What the device does in the chunk it is in, before it is cut off."""
        for command in list(self._unanswered[device_id].values())[:1]:
            if isinstance(command, Denoise):
                for peer in set(command.members) - {device_id}:
                    self._arrive(device_id, peer, self._draw.randint(0, 40 * command.chunk_steps))

    def _arrive(self, me: int, peer: int, times: int) -> None:
        self.counts[me, peer] += times
        self.counters[peer, me] = self.counts[me, peer]


def simulate(seed: int, num_devices: int, respawn_s: float | None, losses: list[tuple[float, int]]) -> Simulation:
    simulation = Simulation(num_devices, executor=CountingExecutor(num_devices, random.Random(seed), respawn_s))
    for number in range(12):
        size = (128, 256, 512)[number % 3]
        simulation.request(f"r{number}", at_s=0.7 * number, width=size, height=size, num_steps=12)
    for at_s, device_id in losses:
        simulation.executor.at(at_s, lambda device_id=device_id: simulation.executor.lose(device_id))
    simulation.run()
    return simulation


def counting(simulation: Simulation) -> CountingExecutor:
    assert isinstance(simulation.executor, CountingExecutor)
    return simulation.executor


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_groups_always_agree_on_what_they_have_counted(data: st.DataObject) -> None:
    num_devices = data.draw(st.integers(2, 5))
    losses = data.draw(st.lists(st.tuples(st.floats(0, 9), st.integers(0, num_devices - 1)), max_size=8))
    respawn_s = data.draw(st.sampled_from([0.0, 0.003, 0.3, 2.0]))
    simulation = simulate(data.draw(st.integers(0, 10**6)), num_devices, respawn_s, losses)
    assert not counting(simulation).disagreements
    assert len(simulation.results) + len(simulation.failures) == 12
    assert all(str(error) == "simulated loss" for error in simulation.failures.values()), "3 attempts, no other reason"
    assert len(simulation.loop.table) == 0


def test_a_worker_that_is_back_is_used_again() -> None:
    simulation = simulate(1, 2, 0.5, [(1.0, 1)])
    assert counting(simulation).joined == [1] and not counting(simulation).disagreements
    assert simulation.results["r11"].degrees[-1] == 2 and not simulation.failures


def test_the_others_go_on_while_a_worker_joins() -> None:
    """The newcomer takes seconds for its reset; the request that runs meanwhile does not wait for it."""

    class SlowNewcomer(SimulatedExecutor):
        def submit(self, command: Command, members: tuple[int, ...]) -> bool:
            if isinstance(command, ResetBarriers) and members == (1,):
                answer = BarriersReset(command_id=command.command_id, device_id=1)
                self.at(self.now_s() + 3.0, lambda: self._events.append(answer))
                return True
            return super().submit(command, members)

    simulation = Simulation(2, executor=SlowNewcomer(COSTS, 2, respawn_s=1.0))
    simulation.request("a", width=512, height=512, num_steps=40, force_degrees=(1,))
    simulation.request("b", at_s=6.0, width=512, height=512)
    simulation.executor.at(0.5, lambda: simulation.executor.lose(1))
    simulation.run()
    assert simulation.results["a"].latency_s == pytest.approx(0.005 + 40 * 0.2 + 0.08, abs=1e-6)
    assert simulation.results["b"].latency_s == pytest.approx(0.005 + 12 * 0.2 + 0.08, abs=0.5)


def test_requests_wait_when_every_worker_is_gone_for_a_while() -> None:
    simulation = simulate(1, 2, 3.0, [(1.0, 0), (1.1, 1)])
    assert len(simulation.results) == 12 and simulation.executor.now_s() > 4.0


def test_nobody_waits_for_workers_that_do_not_come_back() -> None:
    simulation = Simulation(1)
    simulation.request("a", width=512, height=512, num_steps=100)
    simulation.request("b", at_s=0.2)
    simulation.executor.at(1.0, lambda: simulation.executor.lose(0))
    simulation.run()
    assert set(simulation.failures) == {"a", "b"} and simulation.executor.now_s() == 1.0
    with pytest.raises(GenerationError, match="no worker is alive, and none is being started"):
        simulation.loop.submit(resolve_request(ImageRequest(prompt="x", request_id="c", seed=1), SPEC, 1))
