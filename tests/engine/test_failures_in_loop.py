"""What goes wrong in the engine's own process costs the requests that it concerns, and the loop goes on."""

import itertools
import logging
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from tests.engine.loop.test_loop import COSTS, SPEC, Simulation
from tetrion.engine.config import PlannerConfig
from tetrion.engine.errors import EngineEnded, GenerationError
from tetrion.engine.executors.simulated import SimulatedExecutor
from tetrion.engine.loop import dispatch as commands
from tetrion.engine.loop.guarded_planner import FALLBACK, MAX_FAILURES, GuardedPlanner, PlanFault, check_plan
from tetrion.engine.loop.refusals import Refusals
from tetrion.engine.messages import Command, Decode, Denoise, EncodePrompt
from tetrion.engine.planning.degrees import DegreeTables
from tetrion.engine.planning.policies.registry import get_planner
from tetrion.engine.planning.snapshot import Assignment, DeviceView, RequestView, RoundPlan, Snapshot
from tetrion.engine.request import Failure, ImageRequest, Output, Progress, Receipt
from tetrion.engine.resolve import resolve_request
from tetrion.engine.transport.ring import MessageTooLong

HORIZON = get_planner("horizon")


class Slots(SimulatedExecutor):
    """With two image slots, which are given back once, as real ones are."""

    def __init__(self, num_devices: int = 2, num_slots: int = 2) -> None:
        super().__init__(COSTS, num_devices)
        self.num_slots = num_slots
        self.free = set(range(num_slots))

    def acquire_image_slot(self) -> int | None:
        return self.free.pop() if self.free else None

    def release_image_slot(self, image_slot: int) -> None:
        assert image_slot not in self.free
        self.free.add(image_slot)


def run(simulation: Simulation, *names: str, num_steps: int = 6) -> None:
    """`names` at once, and one that comes when all else is over."""
    for name in names:
        simulation.request(name, width=256, height=256, num_steps=num_steps)
    simulation.request("later", at_s=100.0, width=128, height=128, num_steps=2)
    simulation.run()


def check_nothing_is_left(simulation: Simulation) -> None:
    loop = simulation.loop
    assert len(loop.table) == 0 and len(loop._in_flight) == 0
    assert loop.table.slots.num_free == 64
    assert simulation.executor.now_s() < 10_000
    if isinstance(simulation.executor, Slots):
        assert simulation.executor.free == set(range(simulation.executor.num_slots))


def check_only_bad_failed(simulation: Simulation, log: pytest.LogCaptureFixture, *drawn: str) -> None:
    assert set(simulation.failures) == {"bad"} and set(simulation.results) == {*drawn, "later"}
    assert isinstance(simulation.failures["bad"], GenerationError)
    assert any("bad" in record.getMessage() and record.exc_info for record in log.records)
    check_nothing_is_left(simulation)


# Planner ----------------------------------------------------------------------------------------------------------


def has(snapshot: Snapshot, name: str) -> bool:
    return any(view.request_id == name for view in snapshot.all_requests)


def plan_with(simulation: Simulation, spoil: Callable[[Snapshot, RoundPlan], Any]) -> None:
    """`spoil` makes what the policy answers of its plan."""
    simulation.loop.planner = lambda snapshot: spoil(snapshot, HORIZON(snapshot))


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
@pytest.mark.parametrize("others", [(), ("a", "b")])
def test_a_request_that_the_policy_cannot_plan_fails_alone(
    stage: str, others: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    def planner(snapshot: Snapshot) -> RoundPlan:
        for view in snapshot.all_requests:
            if view.request_id == "bad" and view.stage == stage:
                raise ZeroDivisionError("spoilt")
        return HORIZON(snapshot)

    simulation = Simulation(executor=Slots())
    simulation.loop.planner = planner
    run(simulation, "bad", *others)
    check_only_bad_failed(simulation, caplog, *others)
    assert "spoilt" in str(simulation.failures["bad"]) and simulation.loop.policy == "horizon"


def test_many_bad_requests_do_not_cost_the_policy() -> None:
    def planner(snapshot: Snapshot) -> RoundPlan:
        assert not any(view.request_id.startswith("bad") for view in snapshot.all_requests)
        return HORIZON(snapshot)

    simulation = Simulation()
    simulation.loop.planner = planner
    for number in range(3 * MAX_FAILURES):
        simulation.request(f"bad-{number}", at_s=0.1 * number)
    run(simulation, "a")
    assert set(simulation.results) == {"a", "later"} and simulation.loop.policy == "horizon"


def test_a_policy_that_fails_once_is_asked_again() -> None:
    calls = itertools.count()

    def planner(snapshot: Snapshot) -> RoundPlan:
        if next(calls) in (0, 7, 20):
            raise OSError("once")
        return HORIZON(snapshot)

    simulation = Simulation(executor=Slots())
    simulation.loop.planner = planner
    run(simulation, "a", "b")
    assert set(simulation.results) == {"a", "b", "later"} and simulation.loop.policy == "horizon"
    check_nothing_is_left(simulation)


RUBBISH: dict[str, Callable[[Snapshot, RoundPlan], Any]] = {
    "nothing": lambda snapshot, plan: None,
    "a list": lambda snapshot, plan: list(plan.assignments),
    "assignments that are a number": lambda snapshot, plan: msgspec.structs.replace(plan, assignments=7),
    "a wake of no time": lambda snapshot, plan: msgspec.structs.replace(plan, wake_s=float("nan")),
    "a wake that is text": lambda snapshot, plan: msgspec.structs.replace(plan, wake_s="soon"),
    "less than nothing held": lambda snapshot, plan: msgspec.structs.replace(plan, num_held=-1),
    "an unknown request": lambda snapshot, plan: changed(plan, request_id="nobody"),
    "no request's name": lambda snapshot, plan: changed(plan, request_id=["a"]),
    "the wrong stage": lambda snapshot, plan: changed(plan, stage="paint"),
    "no member": lambda snapshot, plan: changed(plan, members=()),
    "one member twice": lambda snapshot, plan: changed(plan, members=(0, 0)),
    "an unknown member": lambda snapshot, plan: changed(plan, members=(99,)),
    "a member that is none": lambda snapshot, plan: changed(plan, members=(True,)),
    "a list of members": lambda snapshot, plan: changed(plan, members=[0]),
    "what is no assignment": lambda snapshot, plan: RoundPlan(assignments=("a",)),  # type: ignore[arg-type]
    "everything twice": lambda snapshot, plan: msgspec.structs.replace(plan, assignments=plan.assignments * 2),
}


def changed(plan: RoundPlan, **fields: Any) -> RoundPlan:
    assignments = tuple(msgspec.structs.replace(assignment, **fields) for assignment in plan.assignments)
    return msgspec.structs.replace(plan, assignments=assignments)


@pytest.mark.parametrize("kind", [*RUBBISH, "an error"])
def test_a_policy_that_fails_again_and_again_is_replaced_and_nobody_fails(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    simulation = Simulation(executor=Slots())
    plan_with(simulation, RUBBISH.get(kind, lambda snapshot, plan: 1 // 0))
    run(simulation, "a", "b")
    assert set(simulation.results) == {"a", "b", "later"} and simulation.loop.policy == FALLBACK
    assert f"from now on {FALLBACK} plans in its place" in caplog.text
    check_nothing_is_left(simulation)


@pytest.mark.parametrize("kind", RUBBISH)
def test_rubbish_for_one_request_ends_it_alone(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    def spoil(snapshot: Snapshot, plan: RoundPlan) -> Any:
        is_bad = has(snapshot, "bad") and any(a.request_id == "bad" for a in plan.assignments)
        return RUBBISH[kind](snapshot, plan) if is_bad else plan

    simulation = Simulation(executor=Slots())
    plan_with(simulation, spoil)
    run(simulation, "bad", "a")
    check_only_bad_failed(simulation, caplog, "a")


@pytest.mark.parametrize(
    "fields", [{"step_index": 1}, {"chunk_steps": 0}, {"chunk_steps": 10_000}, {"chunk_steps": 1.0}]
)
def test_steps_that_are_not_the_next_ones_are_no_plan(fields: dict[str, Any]) -> None:
    def spoil(snapshot: Snapshot, plan: RoundPlan) -> RoundPlan:
        return changed(plan, **fields) if any(a.stage == "denoise" for a in plan.assignments) else plan

    simulation = Simulation(executor=Slots())
    plan_with(simulation, spoil)
    run(simulation, "a")
    assert set(simulation.results) == {"a", "later"} and simulation.loop.policy == FALLBACK


def test_devices_that_are_busy_or_gone_are_no_members() -> None:
    view = RequestView(
        request_id="a",
        stage="encode",
        model=SPEC.name,
        cost_key="128x128",
        step_index=0,
        num_steps=4,
        arrival_s=0.0,
        deadline_s=None,
        ready_s=0.0,
    )
    snapshot = Snapshot(
        now_s=1.0,
        requests=(view,),
        devices=(DeviceView(device_id=0, free_s=0.5), DeviceView(device_id=1, free_s=1.5)),
        tables=DegreeTables(COSTS, 2),
        config=PlannerConfig(),
    )

    def check(device_id: int) -> None:
        assignment = Assignment(request_id="a", stage="encode", members=(device_id,))
        check_plan(RoundPlan(assignments=(assignment,)), snapshot, {"a": view}.get)

    check(0)
    for device_id in (1, 2):
        with pytest.raises(PlanFault, match=f"device {device_id} is not idle"):
            check(device_id)


def test_if_the_last_policy_fails_too_all_requests_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(snapshot: Snapshot) -> RoundPlan:
        raise OSError("broken")

    monkeypatch.setattr("tetrion.engine.loop.guarded_planner.get_planner", lambda name: broken)
    simulation = Simulation(executor=Slots())
    simulation.loop.planner = broken
    run(simulation, "a", "b")
    assert set(simulation.failures) == {"a", "b", "later"}
    assert all("broken" in str(error) for error in simulation.failures.values())
    check_nothing_is_left(simulation)


def test_every_policy_makes_plans_that_can_be_carried_out() -> None:
    for policy in ("horizon", "fixed-1", "fixed-2", "rssp", "tetriserve", "tetriserve-continuous", "edf-best-fit"):
        simulation = Simulation(policy=policy)
        for number in range(12):
            slo_ms = None if number % 3 else 2500.0
            simulation.request(f"{number}", at_s=0.1 * number, width=512, height=512, slo_ms=slo_ms)
        simulation.request("forced", force_degrees=(1, 2, 4, 3))
        simulation.run()
        assert len(simulation.results) == 13 and simulation.loop._guarded_planner._num_failures == 0
        assert simulation.loop.policy == policy


def test_a_good_plan_is_handed_on_as_it_is() -> None:
    plans: list[tuple[RoundPlan, RoundPlan]] = []
    simulation = Simulation()
    guard = GuardedPlanner("horizon")

    def planner(snapshot: Snapshot) -> RoundPlan:
        views = {view.request_id: view for view in snapshot.all_requests}
        plan = HORIZON(snapshot)
        guarded, failed = guard.plan(HORIZON, snapshot, views.get)
        assert not failed
        plans.append((plan, guarded))
        return plan

    simulation.loop.planner = planner
    run(simulation, "a", "b")
    assert plans and all(plan == guarded for plan, guarded in plans)


# Dispatch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [EncodePrompt, Denoise, Decode])
@pytest.mark.parametrize(
    "error", [MessageTooLong("too long"), UnicodeEncodeError("utf-8", "\ud83d", 0, 1, "no"), OverflowError("2**70")]
)
def test_a_command_that_cannot_be_sent_ends_its_request_alone(
    kind: type[Command], error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    class Picky(Slots):
        def submit(self, command: Command, members: tuple[int, ...]) -> bool:
            if isinstance(command, kind) and command.request_id == "bad":  # type: ignore[union-attr]
                raise error
            return super().submit(command, members)

    simulation = Simulation(executor=Picky())
    energy = Told(simulation)
    run(simulation, "a", "bad", "b")
    check_only_bad_failed(simulation, caplog, "a", "b")
    assert not energy.open, "what was announced and not sent is called off"


def test_a_command_that_cannot_be_made_ends_its_request_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make = commands.command_for

    def command_for(assignment: Assignment, *rest: Any) -> Any:
        if assignment.request_id == "bad" and assignment.stage == "denoise":
            raise KeyError("no such thing")
        return make(assignment, *rest)

    monkeypatch.setattr("tetrion.engine.loop.loop.command_for", command_for)
    simulation = Simulation(executor=Slots())
    run(simulation, "a", "bad", "b")
    check_only_bad_failed(simulation, caplog, "a", "b")


def test_a_worker_that_never_takes_a_command_is_killed_and_the_others_go_on() -> None:
    class Full(SimulatedExecutor):
        num_refused = 0

        def submit(self, command: Command, members: tuple[int, ...]) -> bool:
            if 1 in members and isinstance(command, (EncodePrompt, Denoise, Decode)):
                self.num_refused += 1
                return False
            return super().submit(command, members)

    executor = Full(COSTS, 2)
    simulation = Simulation(executor=executor, stall_timeout_s=5.0)
    for number in range(4):
        simulation.request(f"{number}", num_steps=200)
    simulation.run()
    assert len(simulation.results) == 4 and executor.alive == {0}
    assert executor.num_refused < 1000, "it is not asked at every turn of a spinning loop"


def test_workers_that_take_no_commands_are_killed_and_the_engine_ends_without_any() -> None:
    class Full(SimulatedExecutor):
        def submit(self, command: Command, members: tuple[int, ...]) -> bool:
            return not isinstance(command, (EncodePrompt, Denoise, Decode)) and super().submit(command, members)

    simulation = Simulation(executor=Full(COSTS, 2), stall_timeout_s=5.0)
    simulation.request("a")
    with pytest.raises(EngineEnded, match="no worker has been alive for 120 s"):
        simulation.run()
    assert not simulation.executor.alive


def test_a_ring_that_is_full_for_a_moment_costs_nothing_else() -> None:
    class Busy(Slots):
        def submit(self, command: Command, members: tuple[int, ...]) -> bool:
            is_full = 1.0 < self.now_s() < 1.5 and isinstance(command, (EncodePrompt, Denoise, Decode))
            return not is_full and super().submit(command, members)

    simulation = Simulation(executor=Busy(), stall_timeout_s=2.0)
    run(simulation, "a", "b", num_steps=60)
    assert set(simulation.results) == {"a", "b", "later"} and simulation.executor.alive == {0, 1}
    check_nothing_is_left(simulation)


def test_a_picture_that_never_finds_room_fails_and_the_workers_live() -> None:
    simulation = Simulation(executor=Slots(num_slots=0), stall_timeout_s=5.0)
    simulation.request("a")
    simulation.run()
    assert "no room for its picture" in str(simulation.failures["a"])
    assert simulation.executor.alive == {0, 1} and simulation.executor.now_s() < 60


def test_refusals_count_from_the_first_of_an_unbroken_row() -> None:
    refusals = Refusals()
    assert [refusals.refused_s("a", time_s) for time_s in (1.0, 1.5, 2.0, 9.0)] == [0.0, 0.5, 1.0, 0.0]
    refusals.over(["a", "b"])
    assert refusals.refused_s("a", 9.1) == 0.0


# Bookkeeping ------------------------------------------------------------------------------------------------------


class Told:
    """What the energy account is told of commands: `open` are members that are still to answer."""

    def __init__(self, simulation: Simulation) -> None:
        self.open: set[tuple[int, int]] = set()
        energy = simulation.loop._books._energy
        energy.sent = lambda command, members, *_: self.open.update((command.command_id, m) for m in members)  # type: ignore[method-assign, func-returns-value, assignment]
        energy.answered = lambda command_id, device_id, *_: self.open.discard((command_id, device_id))  # type: ignore[method-assign, assignment]
        energy.failed = lambda command_id, device_id, _: self.open.discard((command_id, device_id))  # type: ignore[method-assign, assignment]


def spoil(owner: Any, name: str, is_bad: Callable[..., bool]) -> None:
    """Make a method raise where `is_bad` of its arguments."""
    method = getattr(owner, name)

    def spoilt(*arguments: Any) -> Any:
        if is_bad(*arguments):
            raise ZeroDivisionError("spoilt")
        return method(*arguments)

    setattr(owner, name, spoilt)


def part_of(simulation: Simulation, name: str) -> Any:
    """What the loop's books write to."""
    books = simulation.loop._books
    return books._cost_models[SPEC.name] if name == "_cost_model" else getattr(books, name)


PARTS = [
    ("_cost_model", "observe_aux"),
    ("_cost_model", "observe_step"),
    ("_statistics", "sent"),
    ("_statistics", "answered"),
    ("_statistics", "ended"),
    ("_energy", "sent"),
    ("_energy", "answered"),
    ("_energy", "ended"),
]


@pytest.mark.parametrize(("part", "method"), PARTS)
@pytest.mark.parametrize("nth", [0, 1])
def test_an_error_while_something_is_written_down_ends_one_request(
    part: str, method: str, nth: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It comes once, whoever's turn it is."""
    simulation, calls = Simulation(executor=Slots(num_devices=3)), itertools.count()
    spoil(part_of(simulation, part), method, lambda *_: next(calls) == nth)
    run(simulation, "a", "b", "c")
    assert len(simulation.failures) == 1 and len(simulation.results) == 3
    ((name, error),) = simulation.failures.items()
    assert isinstance(error, GenerationError) and "spoilt" in str(error)
    assert any(f"request {name}" in record.getMessage() and record.exc_info for record in caplog.records)
    check_nothing_is_left(simulation)


def test_a_decode_whose_time_cannot_be_written_down_gives_its_image_slot_back(caplog: pytest.LogCaptureFixture) -> None:
    simulation, calls = Simulation(executor=Slots()), itertools.count()

    def is_bad(_: str, stage: str, __: float) -> bool:
        return stage == "decode" and next(calls) == 0

    spoil(part_of(simulation, "_cost_model"), "observe_aux", is_bad)
    run(simulation, "bad")
    check_only_bad_failed(simulation, caplog)


@pytest.mark.parametrize(("part", "method"), PARTS)
def test_errors_without_end_fail_every_request_and_never_the_loop(part: str, method: str) -> None:
    simulation = Simulation(executor=Slots())
    spoil(part_of(simulation, part), method, lambda *_: True)
    run(simulation, "a", "b", "c")
    assert set(simulation.failures) == {"a", "b", "c", "later"} and not simulation.results
    check_nothing_is_left(simulation)


@pytest.mark.parametrize("method", ["failed", "ended"])
def test_errors_while_a_lost_worker_is_written_down_end_nothing_else(method: str) -> None:
    simulation = Simulation(executor=Slots(num_devices=3))
    spoil(simulation.loop._books._energy, method, lambda *_: method == "failed")
    spoil(simulation.loop._books._statistics, "failed", lambda *_: True)
    simulation.executor.at(0.2, lambda: simulation.executor.lose(1))
    run(simulation, "a", "b", "c", num_steps=30)
    assert len(simulation.results) + len(simulation.failures) == 4 and "later" in simulation.results
    check_nothing_is_left(simulation)


@pytest.mark.parametrize("state", ["ready", "denoising", "finished"])
def test_a_caller_that_raises_loses_its_request_alone(state: str, caplog: pytest.LogCaptureFixture) -> None:
    def is_bad(output: Output) -> bool:
        return isinstance(output, Progress) and (output.request_id, output.state) == ("bad", state)

    simulation = Simulation(executor=Slots())
    spoil(simulation.loop._books, "_outputs", is_bad)
    run(simulation, "a", "bad")
    check_only_bad_failed(simulation, caplog, "a")


def test_a_caller_that_does_not_take_results_is_told_of_a_failure_in_vain(caplog: pytest.LogCaptureFixture) -> None:
    simulation = Simulation(executor=Slots())
    refused: list[Output] = []

    def is_end(output: Output) -> bool:
        if output.request_id != "bad" or isinstance(output, Progress):
            return False
        refused.append(output)
        simulation._due -= isinstance(output, Failure)
        return True

    spoil(simulation.loop._books, "_outputs", is_end)
    run(simulation, "a", "bad")
    assert set(simulation.results) == {"a", "later"} and len(refused) == 2
    assert "request bad" in caplog.text
    check_nothing_is_left(simulation)


def test_an_executor_that_cannot_copy_a_picture_fails_its_request_alone(caplog: pytest.LogCaptureFixture) -> None:
    class Clumsy(Slots):
        def take_image(self, decode: Decode, receipt: Callable[[], Receipt]) -> None:
            if decode.request_id == "bad":
                self.release_image_slot(decode.image_slot)
                raise MemoryError("no room")
            super().take_image(decode, receipt)

    simulation = Simulation(executor=Clumsy())
    simulation.request("bad", width=512, height=512)
    run(simulation, "a")
    check_only_bad_failed(simulation, caplog, "a")


@pytest.mark.parametrize("kind", [EncodePrompt, Denoise, Decode])
def test_answers_of_requests_that_have_ended_meanwhile_are_put_aside(kind: type[Command]) -> None:
    """None is expected to end with something in flight; one that does all the same is not the end of the others."""

    class Watched(Slots):
        def submit(self, command: Command, members: tuple[int, ...]) -> bool:
            if isinstance(command, kind) and command.request_id == "bad":  # type: ignore[union-attr]
                self.at(self.now_s(), end)
            return super().submit(command, members)

    def end() -> None:
        request = simulation.loop.table.get("bad")
        if request is not None:
            simulation.loop._books.end(request, GenerationError("meanwhile"))

    simulation = Simulation(executor=Watched())
    run(simulation, "bad", "a")
    assert set(simulation.results) == {"a", "later"} and set(simulation.failures) == {"bad"}
    check_nothing_is_left(simulation)


def test_admission_that_fails_refuses_the_newcomer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("spoilt")

    refused: list[GenerationError] = []

    def submit_bad() -> None:
        monkeypatch.setattr("tetrion.engine.loop.loop.earliest_deadline_s", broken)
        with pytest.raises(GenerationError, match="admission failed") as caught:
            simulation.loop.submit(resolve_request(ImageRequest(prompt="x", request_id="bad", slo_ms=9e6), SPEC, 4))
        monkeypatch.undo()
        refused.append(caught.value)

    simulation = Simulation(planner={"admission": "reject-hopeless"})
    simulation.executor.at(0.1, submit_bad)
    run(simulation, "a")
    assert len(refused) == 1 and set(simulation.results) == {"a", "later"}


def test_failures_are_logged_as_errors_with_the_id(caplog: pytest.LogCaptureFixture) -> None:
    simulation = Simulation(executor=Slots())
    spoil(part_of(simulation, "_cost_model"), "observe_aux", lambda *_: True)
    simulation.request("the-one")
    simulation.run()
    records = [record for record in caplog.records if "request the-one failed" in record.getMessage()]
    assert [record.levelno for record in records] == [logging.ERROR]
