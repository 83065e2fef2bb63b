"""The real loop on the simulated executor: whole lives of requests in virtual time."""

import asyncio
import itertools
import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.specs import make_spec
from tetrion.engine.config import EngineConfig, PlannerConfig
from tetrion.engine.errors import (
    DeadlineUnmeetable,
    Displaced,
    EngineEnded,
    EngineOverloaded,
    GenerationError,
    QueueTimeout,
    RequestCancelled,
)
from tetrion.engine.executors.base import Happening, PictureReady
from tetrion.engine.executors.simulated import SimulatedExecutor
from tetrion.engine.loop.loop import EngineLoop
from tetrion.engine.messages import Command, Decode, Denoise
from tetrion.engine.planning.cost.correction import CostModels
from tetrion.engine.planning.cost.profile import Profile
from tetrion.engine.planning.cost.tables import CostTables
from tetrion.engine.planning.policies.registry import get_planner
from tetrion.engine.planning.snapshot import Snapshot
from tetrion.engine.request import MAX_ATTEMPTS, Failure, ImageRequest, ImageResult, Output, Progress, Receipt
from tetrion.engine.resolve import resolve_request

SPEC = make_spec()
PROFILE = msgspec.convert(
    {
        "heads": 12,
        "classes": {
            "128x128": {"step_ms": {1: 20, 2: 12, 3: 9, 4: 7}, "encode_ms": 5, "decode_ms": 10},
            "512x512": {"step_ms": {1: 200, 2: 105, 3: 72, 4: 56}, "encode_ms": 5, "decode_ms": 80},
        },
    },
    Profile,
)


def costs_of(profile: Profile) -> CostTables:
    return CostTables(profiles={SPEC.name: profile})


COSTS = costs_of(PROFILE)


class Simulation:
    """A loop on simulated devices; `at` schedules, `run` runs until every request has ended."""

    def __init__(
        self,
        num_devices: int = 4,
        policy: str = "horizon",
        duration: Callable[[Command, float], float] = lambda _, seconds: seconds,
        executor: SimulatedExecutor | None = None,
        planner: dict[str, object] | None = None,
        profile: Profile = PROFILE,
        **config: object,
    ) -> None:
        self.commands: list[Command] = []
        self.results: dict[str, ImageResult] = {}
        self.failures: dict[str, Exception] = {}
        self.progress: dict[str, list[Progress]] = {}
        self.executor = executor or SimulatedExecutor(costs_of(profile), num_devices, self._spy(duration))
        planner = PlannerConfig(policy=policy, **planner or {})  # type: ignore[arg-type]
        engine_config = EngineConfig(planner=planner, **config)  # type: ignore[arg-type]
        self.loop = EngineLoop(
            executor=self.executor,
            planner=get_planner(policy),
            cost_models=CostModels({SPEC.name: profile}),
            config=engine_config,
            outputs=self._receive,
        )
        self._due = 0

    def request(self, request_id: str, at_s: float = 0.0, **fields: object) -> None:
        asked = ImageRequest(**({"prompt": "x", "seed": 1, "request_id": request_id} | fields))  # type: ignore[arg-type]
        resolved = resolve_request(asked, SPEC, len(self.executor.device_ids))
        self._due += 1
        self.executor.at(at_s, lambda: self.loop.submit(resolved) and None)

    def run(self) -> None:
        self.executor.at(10_000.0, self.loop.stop)
        asyncio.run(self.loop.run())

    def _spy(self, duration: Callable[[Command, float], float]) -> Callable[[Command, float], float]:
        def spied(command: Command, seconds: float) -> float:
            self.commands.append(command)
            return duration(command, seconds)

        return spied

    def _receive(self, output: Output) -> None:
        match output:
            case Progress():
                self.progress.setdefault(output.request_id, []).append(output)
            case ImageResult():
                self.results[output.request_id] = output
            case Failure():
                self.failures[output.request_id] = output.error
        if len(self.results) + len(self.failures) == self._due:
            self.loop.stop()

    def chunks(self, request_id: str) -> list[Denoise]:
        return [c for c in self.commands if isinstance(c, Denoise) and c.request_id == request_id]


@pytest.mark.parametrize("policy", ["horizon", "fixed-1", "fixed-2"])
def test_a_request_passes_through_all_its_stages(policy: str) -> None:
    simulation = Simulation(policy=policy)
    simulation.request("a", width=512, height=512)
    simulation.run()
    result = simulation.results["a"]
    assert len(result.degrees) == 12 and result.image.shape == (512, 512, 3)
    assert sum(chunk.chunk_steps for chunk in simulation.chunks("a")) == 12
    states = [update.state for update in simulation.progress["a"]]
    assert states[-1] == "finished" and sorted(u.step_index for u in simulation.progress["a"])[-1] == 12
    assert result.latency_s >= result.encode_s + result.denoise_s + result.decode_s - 1e-9


def test_a_picture_that_cannot_be_copied_fails_its_request_alone() -> None:
    class OutOfMemory(SimulatedExecutor):
        def take_image(self, decode: Decode, receipt: Callable[[], Receipt]) -> None:
            if decode.request_id == "large":
                error = MemoryError("no room")
                self._events.append(PictureReady(command_id=decode.command_id, ready_s=self._now_s, error=error))
            else:
                super().take_image(decode, receipt)

    simulation = Simulation(executor=OutOfMemory(COSTS, 2))
    simulation.request("large", width=512, height=512)
    simulation.request("small", width=128, height=128)
    simulation.run()
    assert set(simulation.results) == {"small"}
    assert isinstance(simulation.failures["large"], GenerationError)
    assert "could not be copied" in str(simulation.failures["large"])


class SlowCopies(SimulatedExecutor):
    """Whose pictures take a second to copy."""

    def take_image(self, decode: Decode, receipt: Callable[[], Receipt]) -> None:
        self.at(self.now_s() + 1.0, lambda: SimulatedExecutor.take_image(self, decode, receipt))


def test_a_requests_latency_ends_when_its_picture_is_copied() -> None:
    simulation = Simulation(executor=SlowCopies(COSTS, 1))
    simulation.request("a", width=512, height=512, num_steps=20)
    simulation.run()
    assert simulation.results["a"].latency_s == pytest.approx(0.005 + 20 * 0.2 + 0.08 + 1.0, abs=1e-6)


def test_latency_does_not_count_how_long_a_copied_picture_waits_for_the_loop() -> None:
    class Early(SimulatedExecutor):
        def poll(self) -> list[Happening]:
            events = super().poll()
            return [
                msgspec.structs.replace(event, ready_s=1.0) if isinstance(event, PictureReady) else event
                for event in events
            ]

    simulation = Simulation(executor=Early(COSTS, 1))
    simulation.request("a", width=512, height=512, num_steps=20)
    simulation.run()
    assert simulation.results["a"].latency_s == 1.0


def test_a_request_cancelled_while_its_picture_is_copied_has_its_result() -> None:
    simulation = Simulation(executor=SlowCopies(COSTS, 1))
    simulation.request("a", width=512, height=512, num_steps=20)
    simulation.executor.at(4.5, lambda: simulation.loop.cancel("a"))
    simulation.run()
    assert set(simulation.results) == {"a"} and not simulation.failures


def test_an_id_may_be_used_again_while_its_first_picture_is_copied() -> None:
    simulation = Simulation(executor=SlowCopies(COSTS, 1))
    results: list[ImageResult] = []
    simulation.loop._books._outputs = lambda output: (
        results.append(output) if isinstance(output, ImageResult) else None  # type: ignore[func-returns-value]
    )
    for at_s, num_steps in ((0.0, 2), (0.1, 3)):
        simulation.request("a", at_s=at_s, width=128, height=128, num_steps=num_steps)
    simulation.executor.at(10.0, simulation.loop.stop)
    simulation.run()
    assert [result.num_steps for result in results] == [2, 3]


def test_a_loop_that_is_stopped_hands_out_the_pictures_that_are_being_copied() -> None:
    simulation = Simulation(executor=SlowCopies(COSTS, 2))
    simulation.request("copied", width=128, height=128, num_steps=2)
    simulation.request("denoised", width=512, height=512)
    simulation.executor.at(0.5, simulation.loop.stop)
    simulation.run()
    assert set(simulation.results) == {"copied"} and simulation.executor.now_s() == pytest.approx(1.0, abs=0.1)
    assert "was stopped" in str(simulation.failures["denoised"])


def test_an_engine_that_gives_itself_up_hands_out_the_pictures_that_are_being_copied() -> None:
    simulation = Simulation(executor=SlowCopies(COSTS, 1), no_worker_timeout_s=0.1)
    simulation.request("copied", width=128, height=128, num_steps=2)
    simulation.request("late", at_s=0.1, width=128, height=128, num_steps=200)
    simulation.executor.at(0.2, lambda: simulation.executor.lose(0))
    with pytest.raises(EngineEnded):
        simulation.run()
    assert set(simulation.results) == {"copied"} and set(simulation.failures) == {"late"}


def test_alone_it_is_wide_and_in_company_narrow() -> None:
    simulation = Simulation()
    simulation.request("first", width=512, height=512, num_steps=40)
    for number in range(8):
        simulation.request(f"r{number}", at_s=1.0, width=512, height=512)
    simulation.run()
    degrees = simulation.results["first"].degrees
    assert degrees[0] == 4 and min(degrees) < 4
    assert not simulation.failures and len(simulation.results) == 9


def test_chunks_of_one_request_follow_each_other_without_a_gap() -> None:
    simulation = Simulation(num_devices=1)
    simulation.request("a", width=512, height=512, num_steps=20)
    simulation.run()
    result = simulation.results["a"]
    assert result.latency_s == pytest.approx(0.005 + 20 * 0.2 + 0.08, abs=1e-6)


@pytest.mark.parametrize(("every_s", "slo_ms"), [(0.05, 700), (0.1, 500), (0.1, 700), (0.2, 500)])
def test_a_plan_does_not_depend_on_which_member_answers_first(every_s: float, slo_ms: float) -> None:
    """Chunks end earlier than predicted; whoever comes next gets all of a group's devices, not only those whose answer
    is there."""

    def degrees(answer_gap_s: float) -> dict[str, tuple[int, ...]]:
        executor = SimulatedExecutor(COSTS, 4, lambda _, seconds: 0.8 * seconds, answer_gap_s=answer_gap_s)
        simulation = Simulation(executor=executor)
        for number in range(3):
            at_s = every_s * number
            simulation.request(f"{number}", at_s=at_s, width=512, height=512, num_steps=6, slo_ms=slo_ms)
        simulation.run()
        return {name: result.degrees for name, result in simulation.results.items()}

    assert degrees(answer_gap_s=0.0005) == degrees(answer_gap_s=0.0)


def test_answers_between_the_first_and_the_last_ask_for_no_plan() -> None:
    """One device is always idle and one request waits for four, so that whoever asks for a plan makes the policy
    decide."""

    def decisions_and_commands(answer_gap_s: float) -> tuple[int, int]:
        executor = SimulatedExecutor(COSTS, 5, answer_gap_s=answer_gap_s)
        simulation, snapshots = Simulation(executor=executor, policy="fixed-4"), list[Snapshot]()
        planner, submit, num_commands = simulation.loop.planner, executor.submit, itertools.count()
        simulation.loop.planner = lambda snapshot: snapshots.append(snapshot) or planner(snapshot)  # type: ignore[func-returns-value]
        executor.submit = lambda *given: next(num_commands) >= 0 and submit(*given)  # type: ignore[method-assign]
        for name in "ab":
            simulation.request(name, width=512, height=512, num_steps=12)
        simulation.run()
        assert {result.degrees for result in simulation.results.values()} == {(4,) * 12}
        return len(snapshots), next(num_commands)

    together, num_commands = decisions_and_commands(answer_gap_s=0.0)
    apart, as_many = decisions_and_commands(answer_gap_s=0.0005)
    assert as_many == num_commands and together <= apart <= together + num_commands


@pytest.mark.parametrize("policy", ["tetriserve-g1", "horizon"])
def test_waits_that_end_early_put_no_plan_off(policy: str) -> None:
    """As a clock of whole milliseconds ends those that are shorter than half of one."""

    waits = itertools.count()

    class Impatient(SimulatedExecutor):
        async def wait(self, until_s: float | None) -> None:
            assert next(waits) < 100_000
            await super().wait(until_s if until_s is None else min(until_s, self.now_s() + 1e-4))

    def latencies_s(executor: SimulatedExecutor) -> list[float]:
        simulation = Simulation(executor=executor, policy=policy)
        for number in range(4):
            simulation.request(f"{number}", at_s=0.07 * number, width=512, height=512, num_steps=6, slo_ms=600)
        simulation.run()
        return [simulation.results[f"{number}"].latency_s for number in range(4)]

    assert latencies_s(Impatient(COSTS, 4)) == pytest.approx(latencies_s(SimulatedExecutor(COSTS, 4)), abs=0.002)


def test_forced_degrees_are_used_step_by_step() -> None:
    simulation = Simulation()
    forced = (1, 1, 2, 4, 3, 3, 1, 2, 2, 4, 1, 1)
    simulation.request("forced", force_degrees=forced)
    for number in range(5):
        simulation.request(f"r{number}", at_s=0.1 * number)
    simulation.run()
    assert simulation.results["forced"].degrees == forced
    assert not simulation.failures


def test_cancelling_takes_effect_at_the_chunk_boundary_and_frees_the_slot() -> None:
    simulation = Simulation(num_devices=1, max_inflight=1)
    simulation.request("a", width=512, height=512, num_steps=100)
    simulation.request("b", at_s=0.5)
    simulation.executor.at(1.0, lambda: simulation.loop.cancel("a"))
    simulation.run()
    assert isinstance(simulation.failures["a"], RequestCancelled)
    assert simulation.results["b"].latency_s < 2.0


def test_a_full_queue_is_refused() -> None:
    simulation = Simulation(max_inflight=1, max_queued=1)
    simulation.loop.submit(resolve_request(ImageRequest(prompt="x", request_id="a", seed=0), SPEC, 4))
    with pytest.raises(EngineOverloaded):
        simulation.loop.submit(resolve_request(ImageRequest(prompt="x", request_id="b", seed=0), SPEC, 4))


def test_in_a_full_queue_the_newest_of_the_largest_tenant_makes_room_for_another() -> None:
    simulation = Simulation(num_devices=1, max_inflight=1, max_queued=3)
    for number in range(3):
        simulation.request(f"hog{number}", tenant="hog")
    simulation.request("hog3", tenant="hog", at_s=0.01)
    simulation.request("small", tenant="other", at_s=0.02)
    simulation.run()
    assert list(simulation.results) == ["hog0", "small", "hog1", "hog2"]
    assert isinstance(simulation.failures["hog3"], Displaced)


def test_what_is_hopeless_is_refused_at_once_with_the_deadline_that_is_not() -> None:
    def submit(request_id: str, slo_ms: float) -> None:
        params = ImageRequest(prompt="x", seed=1, request_id=request_id, width=512, height=512, slo_ms=slo_ms)
        simulation.loop.submit(resolve_request(params, SPEC, 1))
        simulation._due += 1

    def submit_all() -> None:
        submit("a", 2600)
        with pytest.raises(DeadlineUnmeetable, match="slo_ms: 2600") as refused:
            submit("b", 2600)
        earliest.append(refused.value.earliest_slo_ms)
        submit("c", earliest[0])

    earliest: list[float] = []
    simulation = Simulation(num_devices=1, max_inflight=1, planner={"admission": "reject-hopeless"})
    simulation.executor.at(0.1, submit_all)
    simulation.run()
    one_ms = 5 + 12 * 200 + 80
    assert earliest[0] == pytest.approx(2 * one_ms, rel=0.05)
    assert {name: result.slo_met for name, result in simulation.results.items()} == {"a": True, "c": True}


def test_a_lost_worker_costs_time_but_no_request() -> None:
    simulation = Simulation()
    for number in range(6):
        simulation.request(f"r{number}", at_s=0.05 * number, width=512, height=512)
    simulation.executor.at(1.0, lambda: simulation.executor.lose(2))
    simulation.run()
    assert len(simulation.results) == 6 and not simulation.failures
    late = [chunk for chunk in simulation.commands if isinstance(chunk, Denoise) and 2 in chunk.members]
    assert late and all(len(result.degrees) == 12 for result in simulation.results.values())


def test_without_workers_requests_fail_instead_of_waiting() -> None:
    simulation = Simulation(num_devices=2)
    for number in range(3):
        simulation.request(f"r{number}", width=512, height=512)
    simulation.executor.at(0.5, lambda: simulation.executor.lose(0))
    simulation.executor.at(0.6, lambda: simulation.executor.lose(1))
    with pytest.raises(EngineEnded, match="no worker has been alive for 120 s"):
        simulation.run()
    assert len(simulation.failures) == 3
    assert all(isinstance(error, GenerationError) for error in simulation.failures.values())


def test_the_last_worker_lost_ends_those_that_hold_nothing_yet() -> None:
    simulation = Simulation(num_devices=1, max_inflight=2)
    for number in range(5):
        simulation.request(f"r{number}", width=512, height=512)
    simulation.executor.at(0.001, lambda: simulation.executor.lose(0))
    with pytest.raises(EngineEnded, match="no worker has been alive for 120 s"):
        simulation.run()
    assert len(simulation.failures) == 5 and simulation.executor.now_s() < 125


def test_a_worker_that_hangs_is_replaced_by_the_others() -> None:
    hung: list[Command] = []

    def duration(command: Command, seconds: float) -> float:
        if isinstance(command, Denoise) and command.request_id == "r1" and not hung:
            hung.append(command)
            return math.inf
        return seconds

    simulation = Simulation(num_devices=3, duration=duration, stall_timeout_s=2.0)
    for number in range(3):
        simulation.request(f"r{number}", width=512, height=512)
    simulation.run()
    assert hung and set(simulation.results) == {"r0", "r1", "r2"}


def test_a_loop_that_stood_still_reads_what_has_come_before_it_judges() -> None:
    simulation = Simulation(num_devices=2, stall_timeout_s=2.0)
    executor, killed, unread = simulation.executor, list[str](), list[None]()
    poll = executor.poll

    def stand_still() -> None:
        executor._now_s += 100
        unread.append(None)

    def read_late() -> list[Happening]:
        if unread:
            unread.clear()
            return []
        return poll()

    executor.poll, executor.kill = read_late, lambda _, reason: killed.append(reason)  # type: ignore[method-assign]
    executor.at(0.02, stand_still)
    simulation.request("a", width=512, height=512)
    simulation.run()
    assert executor.now_s() > 100 and set(simulation.results) == {"a"} and not killed


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_every_request_ends_whatever_happens(data: st.DataObject) -> None:
    """Random arrivals, sizes, deadlines, cancellations and losses: nobody waits for ever, nothing leaks, and only who
    was hit by `MAX_ATTEMPTS` losses is given up."""
    num_devices = data.draw(st.integers(1, 5))
    noise = data.draw(st.randoms(use_true_random=False))
    simulation = Simulation(
        num_devices=num_devices,
        policy=data.draw(st.sampled_from(["horizon", "fixed-1"])),
        duration=lambda _, seconds: seconds * noise.uniform(0.7, 1.5),
        max_inflight=data.draw(st.integers(1, 6)),
    )
    num_requests = data.draw(st.integers(1, 12))
    for number in range(num_requests):
        simulation.request(
            f"r{number}",
            at_s=data.draw(st.floats(0, 2)),
            width=data.draw(st.sampled_from([128, 256, 512])),
            num_steps=data.draw(st.integers(1, 8)),
            slo_ms=data.draw(st.one_of(st.none(), st.floats(10, 5000))),
        )
        if data.draw(st.integers(0, 4)) == 0:
            request_id = f"r{number}"
            at_s = data.draw(st.floats(0, 3))
            simulation.executor.at(at_s, lambda request_id=request_id: simulation.loop.cancel(request_id))
    num_losses = 0
    for device_id in range(num_devices - 1):
        if data.draw(st.integers(0, 5)) == 0:
            at_s = data.draw(st.floats(0, 3))
            simulation.executor.at(at_s, lambda device_id=device_id: simulation.executor.lose(device_id))
            num_losses += 1
    simulation.run()
    assert len(simulation.results) + len(simulation.failures) == num_requests
    if num_losses < MAX_ATTEMPTS:
        assert all(isinstance(error, RequestCancelled) for error in simulation.failures.values())
    assert len(simulation.loop.table) == 0
    assert simulation.executor.now_s() < 10_000


def test_a_request_that_gets_no_slot_in_time_fails_alone() -> None:
    simulation = Simulation(num_devices=1, max_inflight=1, queue_timeout_s=0.5)
    simulation.request("long", width=512, height=512)
    simulation.request("late", at_s=0.1, width=128, height=128)
    simulation.run()
    assert set(simulation.results) == {"long"} and isinstance(simulation.failures["late"], QueueTimeout)
    assert "waited for 0.5 s" in str(simulation.failures["late"])
    assert simulation.loop.table.num_queued == 0


def test_a_request_that_owns_a_slot_and_is_given_nothing_fails_alone() -> None:
    """What runs is never cut: that the second one could run is all that the first one owes it."""
    simulation = Simulation(num_devices=1, max_inflight=2, queue_timeout_s=0.5)
    simulation.request("runs", width=512, height=512)
    simulation.request("starves", at_s=0.1, width=512, height=512)
    simulation.run()
    assert set(simulation.results) == {"runs"} and simulation.results["runs"].latency_s > 2.0
    assert isinstance(simulation.failures["starves"], QueueTimeout)


def test_what_runs_and_what_waits_for_a_lost_worker_is_not_cut() -> None:
    executor = SimulatedExecutor(COSTS, 1, lambda _, seconds: 5 * seconds, respawn_s=3.0)
    simulation = Simulation(executor=executor, queue_timeout_s=0.2)
    simulation.request("a", width=512, height=512, num_steps=3)
    executor.at(1.5, lambda: executor.lose(0))
    simulation.run()
    assert set(simulation.results) == {"a"} and simulation.results["a"].latency_s > 4.0


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_every_admitted_request_is_answered_or_fails_within_the_timeout_of_its_last_sign(data: st.DataObject) -> None:
    """Overload without end: feasible ones keep coming."""
    timeout_s = data.draw(st.sampled_from((1.0, 3.0)))
    simulation = Simulation(
        num_devices=data.draw(st.integers(1, 2)),
        max_inflight=data.draw(st.sampled_from((1, 2, 8, 16))),
        queue_timeout_s=timeout_s,
        planner={"admission": data.draw(st.sampled_from(("all", "reject-hopeless")))},
    )
    arrivals: dict[str, float] = {}
    ended: dict[str, float] = {}
    refused: set[str] = set()
    receive = simulation.loop._books._outputs

    def note(output: Output) -> None:
        ended[output.request_id] = simulation.executor.now_s()
        receive(output)

    def submit(name: str, **fields: Any) -> None:
        asked = ImageRequest(prompt="x", seed=1, request_id=name, **fields)
        try:
            simulation.loop.submit(resolve_request(asked, SPEC, 1))
            arrivals[name] = simulation.executor.now_s()
        except DeadlineUnmeetable:
            refused.add(name)

    simulation.loop._books._outputs = note
    slo_ms = data.draw(st.sampled_from((400.0, 1500.0)))
    for number in range(40):
        fields = {"width": 128, "height": 128, "slo_ms": None if number % 7 == 0 else slo_ms}
        simulation.executor.at(0.1 * number, lambda name=f"{number}", fields=fields: submit(name, **fields))
    simulation._due = 41
    simulation.executor.at(60.0, simulation.loop.stop)
    simulation.run()
    assert arrivals.keys() == ended.keys() and len(arrivals) + len(refused) == 40
    assert not refused & {name for name in arrivals}
    silent_s = max(ended[name] - arrivals[name] for name in arrivals)
    assert silent_s < timeout_s + 3.0, "a picture takes less than 0.3 s of devices, and has few chunks"
    assert len(simulation.loop.table) == 0
