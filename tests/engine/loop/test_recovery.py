"""The recovery protocol: whatever dies, and whenever, two devices that meet in a group have counted the same.

The real loop on simulated devices that also keep what real ones keep of each other: at each end a count of the barriers
passed with a peer, and in each slab a counter per peer (engine/parallel/cpu/barrier.py). A device that dies leaves its
slab as it is, and may have come to its next command without a word of the one before, as GPUs do. One that is aborted
writes on for a while, and answers late, unless it is reset before; so does one that is told to reset. They also keep
which state is in each buffer of their slots, and in host memory: what a chunk writes is in doubt from its entry to its
end, what it reads is not.
"""

import random
import re
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import combinations
from typing import ClassVar, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.loop.test_loop import COSTS, Simulation
from tetrion.engine.errors import EngineEnded
from tetrion.engine.executors.simulated import SimulatedExecutor, _source
from tetrion.engine.loop.request_table import RequestTable
from tetrion.engine.messages import (
    BarriersReset,
    Command,
    Decode,
    Denoise,
    EncodePrompt,
    Event,
    ResetBarriers,
    StageCommand,
)
from tetrion.engine.parallel.layout import NUM_BUFFERS
from tetrion.engine.request import MAX_ATTEMPTS, Failure, Output
from tetrion.engine.roles import parse_roles


class Held(NamedTuple):
    """A state in a buffer."""

    state_id: int
    step: int


def _place(command: StageCommand, chunks: int = 0) -> tuple[int, int]:
    """Slot and buffer of the state that a command is about, or of the one so many chunks later."""
    return command.slot, (command.chunk_index + chunks) % NUM_BUFFERS


class CountingExecutor(SimulatedExecutor):
    """`draw` decides how many barriers a chunk passes before it is cut off, and how late answers are."""

    def __init__(self, num_devices: int, draw: random.Random, respawn_s: float | None) -> None:
        super().__init__(COSTS, num_devices, lambda _, seconds: seconds * draw.uniform(0.7, 1.4), respawn_s)
        self.counts: Counter[tuple[int, int]] = Counter()
        self.counters: Counter[tuple[int, int]] = Counter()
        self.disagreements: list[tuple[int, int]] = []
        self.num_groups = 0
        self.joined: list[int] = []
        self.late_s = [0.0]
        """How much later a device's answers may come."""
        self._answers_s = dict.fromkeys(self.device_ids, 0.0)
        self._waiting: set[int] = set()
        """Commands whose source has not the state that they are about: until they are aborted, or for ever."""
        self.num_steps_done = Counter[str]()
        """Steps that came to something, by request; what is done again counts again."""
        self.num_unanswered = 0
        """Steps that the engine knew nothing of yet when devices died: some may have been executed."""
        self.table: RequestTable | None = None
        self._held: dict[tuple[int, int, int], Held] = {}
        """By device, slot and buffer."""
        self._saved: dict[tuple[int, int], tuple[str, int]] = {}
        """By slot and buffer: request and step."""
        self._draw = draw
        self._life = Counter[int]()
        self._aborts: dict[int, object] = {}

    def submit(self, command: Command, members: tuple[int, ...]) -> bool:
        if isinstance(command, Denoise):
            for me in members:
                self.at(max(self.now_s(), self._free_s[me]), lambda me=me: self._enter(me, command))
        if not isinstance(command, ResetBarriers):
            assert isinstance(command, StageCommand)
            begin_s = max(self._state_s.get(_source(command), 0.0), *[self._free_s[m] for m in members])
            self.at(max(self.now_s(), begin_s), lambda: self._begin(command, members))
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
            admitted = () if self.table is None else self.table.admitted()
            self.num_unanswered += sum(r.planned_step_index - r.step_index for r in admitted)
            self._pass_some_barriers(device_id)
            self._come_to_the_next(device_id)
            super().lose(device_id)
            self._held = {key: step for key, step in self._held.items() if key[0] != device_id}
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

    def _complete(self, ticket: int, command: StageCommand, members: tuple[int, ...], start_s: float) -> None:
        if command.command_id in self._waiting:
            return
        if isinstance(command, Denoise) and all(ticket in self._unanswered[m] for m in members):
            self.num_groups += len(members) > 1
            for a, b in combinations(members, 2):
                if len({self.counts[a, b], self.counts[b, a], self.counters[a, b], self.counters[b, a]}) > 1:
                    self.disagreements.append((a, b))
                for me, peer in ((a, b), (b, a)):
                    self._arrive(me, peer, 40 * command.chunk_steps)
        if all(ticket in self._unanswered[m] for m in members):
            self._executed(command, members)
        super()._complete(ticket, command, members, start_s)

    def _answer(self, ticket: int, member: int, event: Event) -> None:
        """Later, but in the order of the device's commands: its answers may be behind those to what came next."""
        late_s = self._draw.choice(self.late_s) if len(self.late_s) > 1 else self.late_s[0]
        at_s = self._answers_s[member] = max(self.now_s() + late_s, self._answers_s[member])
        self.at(at_s, lambda: super(CountingExecutor, self)._answer(ticket, member, event))

    def _executed(self, command: StageCommand, members: tuple[int, ...]) -> None:
        if isinstance(command, Decode):
            return
        if isinstance(command, Denoise):
            self.num_steps_done[command.request_id] += command.chunk_steps
            self._saved[_place(command, 1)] = command.request_id, command.step_index + command.chunk_steps
        self._leave(command, members)

    def _leave(self, command: EncodePrompt | Denoise, members: tuple[int, ...]) -> None:
        """What it makes is in the slots of its members."""
        is_chunk = isinstance(command, Denoise)
        held = Held(command.state_id, command.step_index + (command.chunk_steps if is_chunk else 0))
        self._held |= dict.fromkeys([(member, *_place(command, is_chunk)) for member in members], held)

    def _begin(self, command: StageCommand, members: tuple[int, ...]) -> None:
        """Unless it was lost or aborted before: members take the state that it is about, if it is there."""
        if not all(any(held is command for held in self._unanswered[member].values()) for member in members):
            return
        if isinstance(command, EncodePrompt):
            if command.step_index:
                assert self._saved[_place(command)] == (command.request_id, command.step_index)
            return
        is_last = isinstance(command, Decode)
        state_id, step = _source(command)[0], command.params.num_steps if is_last else command.step_index
        holders = {command.source} if is_last else {command.source, *(set(command.holders) & set(members))}
        if any(self._held.get((holder, *_place(command))) != Held(state_id, step) for holder in holders):
            self._waiting.add(command.command_id)
        elif not is_last:
            for member in members:
                self._held[member, *_place(command)] = Held(state_id, step)
                self._held.pop((member, *_place(command, 1)), None)

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

    def _come_to_the_next(self, device_id: int) -> None:
        """What it was at is done, but not answered; the next, with all of its members, is cut off half-way."""
        commands = list(self._unanswered[device_id].values())
        if len(commands) > 1 and isinstance(commands[0], Denoise):
            self._leave(commands[0], commands[0].members)
        for command in commands[1:]:
            if isinstance(command, Denoise):
                for member in command.members:
                    self._held.pop((member, *_place(command, 1)), None)
                self._saved.pop(_place(command, 1), None)

    def _arrive(self, me: int, peer: int, times: int) -> None:
        self.counts[me, peer] += times
        self.counters[peer, me] = self.counts[me, peer]


def simulate(
    seed: int,
    num_devices: int,
    respawn_s: float | None,
    losses: list[tuple[float, int]],
    late_s: Sequence[float] = (0.0,),
) -> Simulation:
    simulation = Simulation(num_devices, executor=CountingExecutor(num_devices, random.Random(seed), respawn_s))
    counting(simulation).late_s = list(late_s)
    counting(simulation).table = simulation.loop.table
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
    late_s = data.draw(st.sampled_from([(0.0,), (0.0, 0.01), (0.0, 0.3), (0.001, 0.01, 1.0)]))
    simulation = simulate(data.draw(st.integers(0, 10**6)), num_devices, respawn_s, losses, late_s)
    assert not counting(simulation).disagreements
    assert len(simulation.results) + len(simulation.failures) == 12
    again = [counting(simulation).num_steps_done[request_id] - 12 for request_id in simulation.results]
    assert min(again, default=0) >= 0 and sum(again) <= counting(simulation).num_unanswered
    assert all(str(error) == "simulated loss" for error in simulation.failures.values()), "3 attempts, no other reason"
    assert len(simulation.loop.table) == 0


def losing(at_s: float, device_id: int, num_devices: int, **planner: object) -> Simulation:
    executor = CountingExecutor(num_devices, random.Random(1), 0.5)
    simulation = Simulation(num_devices, executor=executor, planner=planner)
    simulation.executor.at(at_s, lambda: simulation.executor.lose(device_id))
    return simulation


def test_a_request_that_rests_on_the_dead_device_and_another_goes_on_from_there() -> None:
    """It is kept from resting on by a policy that gives it nothing for a second."""
    from tetrion.engine.planning.snapshot import RoundPlan

    simulation = losing(3.0, device_id=0, num_devices=3)
    planner = simulation.loop.planner
    simulation.loop.planner = lambda snapshot: (
        RoundPlan(wake_s=snapshot.now_s + 0.1) if 2.5 < snapshot.now_s < 3.5 else planner(snapshot)
    )
    simulation.request("a", width=512, height=512, num_steps=40, force_degrees=(2,))
    simulation.run()
    executor = counting(simulation)
    assert executor.num_steps_done["a"] == 40
    assert simulation.results["a"].degrees == (2,) * 40


def test_two_chunks_that_are_cut_off_at_once_are_both_done_again() -> None:
    """`c` stands behind `b` on both devices, and the one that dies may have come to it."""
    simulation = losing(2.7, device_id=1, num_devices=2, lead_s=1.0)
    executor, behind = counting(simulation), []
    executor.at(2.699, lambda: behind.extend(command.request_id for command in executor._unanswered[1].values()))
    for number, request_id in enumerate("abc"):
        wish = {"num_steps": 12, "slo_ms": 4000 - 700 * number, "force_degrees": (2,)}
        simulation.request(request_id, at_s=0.4 * number, width=512, height=512, **wish)
    simulation.run()
    assert behind == ["b", "c"]
    assert simulation.results.keys() == {"a", "b", "c"} and simulation.loop.recovery_figures.num_deaths == 1
    assert all(executor.num_steps_done[request_id] == 12 for request_id in "abc")


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("at_s", [0.05, 1.7, 2.0, 2.6, 3.0])
def test_a_loss_repeats_no_more_than_the_chunk_that_it_cut_off(degree: int, at_s: float) -> None:
    """Whether others have the state (degrees 2 and 3), or nobody (1): then it was saved."""
    simulation = losing(at_s, device_id=0, num_devices=3)
    executor, chunks = counting(simulation), []
    executor.at(at_s - 0.001, lambda: chunks.extend(executor._unanswered[0].values()))
    simulation.request("a", width=512, height=512, num_steps=40, force_degrees=(degree,))
    simulation.run()
    figures = simulation.loop.recovery_figures
    assert len(simulation.results["a"].degrees) == executor.num_steps_done["a"] == 40
    assert figures.num_deaths == 1
    assert figures.num_repeated_steps == sum(getattr(command, "chunk_steps", 0) for command in chunks[:1])


def test_a_request_whose_steps_are_done_is_decoded_elsewhere_if_its_only_holder_dies() -> None:
    simulation = losing(0.0, device_id=0, num_devices=2)
    executor = counting(simulation)
    original = executor.submit

    def submit(command: Command, members: tuple[int, ...]) -> bool:
        if isinstance(command, Decode) and executor.alive == {0, 1} and not executor.num_steps_done["lost"]:
            executor.num_steps_done["lost"] += 1
            executor.at(executor.now_s() + 0.001, lambda: executor.lose(members[0]))
        return original(command, members)

    executor.submit = submit  # type: ignore[method-assign]
    simulation.request("a", at_s=2.0, width=512, height=512, num_steps=6, force_degrees=(1,))
    simulation.run()
    figures = simulation.loop.recovery_figures
    assert executor.num_steps_done == {"a": 6, "lost": 1} and simulation.results["a"].degrees == (1,) * 6
    assert (figures.num_deaths, figures.num_retries, figures.num_repeated_steps <= 1) == (2, 1, True)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_nobody_fails_for_what_others_did(data: st.DataObject) -> None:
    """However often devices die: only a request whose own commands they were at counts it."""
    num_losses = data.draw(st.integers(1, 12))
    simulation = Simulation(3, executor=CountingExecutor(3, random.Random(data.draw(st.integers(0, 99))), 0.05))
    executor = counting(simulation)
    blamed = Counter[str]()

    def lose(device_id: int) -> None:
        if device_id in executor.alive:
            blamed.update([command.request_id for command in list(executor._unanswered[device_id].values())[:1]])
            executor.lose(device_id)

    for _ in range(num_losses):
        device_id = data.draw(st.integers(0, 2))
        executor.at(data.draw(st.floats(0, 12)), lambda device_id=device_id: lose(device_id))
    for number in range(6):
        simulation.request(f"r{number}", at_s=0.3 * number, width=512, height=512, num_steps=8)
    simulation.run()
    assert not executor.disagreements and len(simulation.results) + len(simulation.failures) == 6
    assert all(blamed[request_id] >= MAX_ATTEMPTS for request_id in simulation.failures)


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


def test_an_engine_that_has_no_worker_for_too_long_ends_with_all_its_requests() -> None:
    simulation = Simulation(1, no_worker_timeout_s=30.0)
    simulation.request("a", width=512, height=512, num_steps=100)
    simulation.request("b", at_s=20.0)
    simulation.executor.at(1.0, lambda: simulation.executor.lose(0))
    with pytest.raises(EngineEnded, match=r"no worker has been alive for 30 s; .* worker 0: simulated loss"):
        simulation.run()
    assert set(simulation.failures) == {"a", "b"} and simulation.executor.now_s() == pytest.approx(31.0, abs=1.5)
    assert all(isinstance(error, EngineEnded) for error in simulation.failures.values())


def test_requests_wait_for_the_only_device_of_their_stage_while_others_go_on() -> None:
    stages = parse_roles("0:encode+decode,1-2:denoise", 3)
    simulation = Simulation(3, executor=SimulatedExecutor(COSTS, 3, respawn_s=20.0, stages=stages))
    simulation.request("a", num_steps=12)
    simulation.request("b", at_s=0.5)
    progress_s: dict[int, float] = {}
    simulation.executor.at(0.1, lambda: simulation.executor.lose(0))
    simulation.executor.at(15.0, lambda: progress_s.update({simulation.progress["a"][-1].step_index: 15.0}))
    simulation.run()
    assert progress_s == {12: 15.0}
    assert simulation.results.keys() == {"a", "b"} and not simulation.failures
    assert min(result.latency_s for result in simulation.results.values()) > 15.0


def test_an_engine_whose_stage_nobody_serves_for_long_ends() -> None:
    stages = parse_roles("0:encode,1:denoise+decode", 2)
    simulation = Simulation(2, executor=SimulatedExecutor(COSTS, 2, stages=stages), no_worker_timeout_s=30.0)
    simulation.executor.at(0.1, lambda: simulation.executor.lose(0))
    simulation.request("a", at_s=1.0)
    with pytest.raises(EngineEnded, match="no worker that serves encode has been alive for 30 s"):
        simulation.run()


def test_a_worker_that_is_back_in_time_keeps_the_engine_from_ending() -> None:
    simulation = Simulation(1, executor=SimulatedExecutor(COSTS, 1, respawn_s=29.0), no_worker_timeout_s=30.0)
    simulation.request("a", width=512, height=512, num_steps=100)
    for at_s in (1.0, 31.0):
        simulation.executor.at(at_s, lambda: simulation.executor.lose(0))
    simulation.run()
    assert set(simulation.results) == {"a"}
    figures = simulation.loop.recovery_figures
    assert (figures.num_deaths, figures.num_respawns, figures.num_retries) == (2, 2, 2)


class SilentExecutor(SimulatedExecutor):
    """Devices in `silent` do not react to an abort, and take `dies_after_s` to die when they are killed."""

    def __init__(self, num_devices: int, silent: set[int], dies_after_s: float, respawn_s: float | None) -> None:
        super().__init__(COSTS, num_devices, respawn_s=respawn_s)
        self.silent = silent
        self.killed: list[tuple[float, int]] = []
        self._dies_after_s = dies_after_s

    def abort(self, device_ids: Collection[int]) -> None:
        super().abort(set(device_ids) - self.silent)

    def kill(self, device_id: int, reason: str) -> None:
        if device_id in dict(self.killed).values() or device_id not in self.alive:
            return
        self.killed.append((self.now_s(), device_id))
        self.at(self.now_s() + self._dies_after_s, lambda: self.lose(device_id))

    def lose(self, device_id: int) -> None:
        super().lose(device_id)
        self.silent.discard(device_id)


def drained_for_ever(dies_after_s: float, **config: object) -> Simulation:
    """Two devices in one group, of which one dies and the other does not even react to an abort."""
    executor = SilentExecutor(2, {0}, dies_after_s, respawn_s=1.0)
    simulation = Simulation(2, executor=executor, stall_timeout_s=5.0, **config)
    simulation.request("a", width=512, height=512, num_steps=100, force_degrees=(2,))
    simulation.request("b", at_s=7.0, width=512, height=512)
    executor.at(1.0, lambda: executor.lose(1))
    return simulation


def test_a_drain_that_does_not_end_fails_its_requests_with_the_reason_and_later_ones_are_served() -> None:
    simulation = drained_for_ever(dies_after_s=20.0)
    failed_s: list[float] = []
    outputs = simulation.loop._books._outputs

    def note(output: Output) -> None:
        if isinstance(output, Failure):
            failed_s.append(simulation.executor.now_s())
        outputs(output)

    simulation.loop._books._outputs = note
    simulation.run()
    assert isinstance(simulation.executor, SilentExecutor)
    assert [device_id for _, device_id in simulation.executor.killed] == [0]
    assert failed_s == [pytest.approx(6.0, abs=1.5)], "at once, not when the loss is reported"
    assert re.fullmatch(r"simulated loss; then worker 0 did not answer for [56] s", str(simulation.failures["a"])), (
        simulation.failures
    )
    assert set(simulation.results) == {"b"}


def test_an_engine_whose_recovery_never_ends_gives_itself_up() -> None:
    simulation = drained_for_ever(dies_after_s=10_000.0, no_worker_timeout_s=20.0)
    with pytest.raises(EngineEnded, match="worker 0 neither answers nor ends"):
        simulation.run()
    assert set(simulation.failures) == {"a", "b"}


def test_the_id_of_a_request_that_failed_in_a_drain_may_be_used_again_at_once() -> None:
    simulation = drained_for_ever(dies_after_s=4.0)
    simulation.request("a", at_s=8.0, width=512, height=512, num_steps=20)
    simulation.run()
    assert set(simulation.failures) == {"a"} and set(simulation.results) == {"a", "b"}
    assert len(simulation.results["a"].degrees) == 20


def test_nobody_is_killed_for_the_sake_of_one_whose_loss_is_about_to_be_reported() -> None:
    """The end of a dead worker may take long to be certain; its partner waits in a barrier meanwhile."""

    class LateNews(SimulatedExecutor):
        killed: ClassVar[list[int]] = []
        is_unreported = False

        def lose(self, device_id: int) -> None:
            self.alive -= {device_id}
            self._unanswered[device_id].clear()
            self.is_unreported = True
            self.at(self.now_s() + 30.0, lambda: self.report(device_id))

        def report(self, device_id: int) -> None:
            self.is_unreported = False
            super().lose(device_id)

        def submit(self, command: Command, members: tuple[int, ...]) -> bool:
            if not self.is_unreported or not isinstance(command, Denoise | Decode):
                return super().submit(command, members)
            for member in set(members) & self.alive:  # behind the chunk in which it waits for the dead one
                self._unanswered[member][next(self._order)] = command
            return True

        def kill(self, device_id: int, reason: str) -> None:
            self.killed.append(device_id)

    executor = LateNews(COSTS, 2, respawn_s=1.0)
    simulation = Simulation(2, executor=executor, stall_timeout_s=5.0)
    simulation.request("a", width=512, height=512, num_steps=20, force_degrees=(2,))
    executor.at(1.0, lambda: executor.lose(1))
    simulation.run()
    assert set(simulation.results) == {"a"} and not executor.killed
