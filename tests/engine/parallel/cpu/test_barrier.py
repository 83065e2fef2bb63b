"""Barriers, aborts and slot versions between real processes."""

import threading
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.parallel.cpu.barrier import PairwiseBarrier, has_reached
from tetrion.engine.parallel.layout import ControlLayout, slab_layout

groups = st.permutations(range(4)).flatmap(lambda order: st.integers(1, 4).map(lambda size: order[:size]))
delays_s = st.sampled_from([0.0, 0.0, 0.0, 0.0002, 0.002])
schedules = st.lists(st.tuples(groups, st.lists(delays_s, min_size=4, max_size=4)), min_size=1, max_size=12)
in_processes = settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def barrier(members: list[int], ticket: int = 0) -> dict[str, Any]:
    return {"op": "barrier", "members": members, "ticket": ticket}


@in_processes
@given(schedule=schedules)
def test_nobody_passes_before_all_have_arrived(fleet: Any, schedule: list[Any]) -> None:
    """Any sequence of groups, disjoint or overlapping, in one global order that every device follows."""
    fleet.reset()
    operations: dict[int, list[dict[str, Any]]] = {d: [] for d in range(4)}
    for ticket, (members, delays) in enumerate(schedule, start=1):
        for device in members:
            operations[device] += [{"op": "sleep", "seconds": delays[device]}, barrier(members, ticket)]
    found = fleet.run(operations)
    for ticket, (members, _) in enumerate(schedule, start=1):
        for device in members:
            position = 2 * sum(device in group for group, _ in schedule[:ticket]) - 1
            assert min(found[device][position]) >= ticket, f"barrier {ticket} of {members} on device {device}"


def test_abort_frees_waiters_and_reset_makes_all_work_again(fleet: Any) -> None:
    fleet.run({d: [barrier([0, 1, 2])] for d in (0, 1, 2)})
    for device in (0, 1):
        fleet.send(device, barrier([0, 1, 2]))
    assert not fleet.has_answered(0, 0.2) and not fleet.has_answered(1, 0.0)
    for device in (0, 1):
        fleet.abort.set(device)
    assert all("aborted" in fleet.receive(device) for device in (0, 1))
    fleet.send(0, barrier([0]))
    assert "aborted" in fleet.receive(0), "an aborted device must not go on before it is reset"
    fleet.reset()
    assert not fleet.abort.is_set(0)
    found = fleet.run({d: [barrier([3, 1, 0, 2], 7), barrier([2, 0], 8)] for d in (0, 2)} | {
        d: [barrier([3, 1, 0, 2], 7)] for d in (1, 3)
    })  # fmt: skip
    assert all(min(tickets) >= 7 for results in found.values() for tickets in results)


def test_killed_member_is_replaced(fleet: Any) -> None:
    """SIGKILL in a wait: survivors are freed by the abort; a new process takes over the old slab."""
    for device in (1, 2, 3):
        fleet.send(device, barrier([1, 2, 3, 0]))
    assert not fleet.has_answered(1, 0.1)
    fleet.kill(2)
    for device in (1, 3):
        fleet.abort.set(device)
    assert all("aborted" in fleet.receive(device) for device in (1, 3))
    fleet.start(2)
    assert fleet.results(2) == ["started"]
    fleet.reset()
    found = fleet.run({d: [barrier([1, 2, 3, 0], 5)] for d in range(4)})
    assert all(tickets == [[5, 5, 5, 5]] for tickets in found.values())


def test_wait_version_wants_the_same_state_and_enough_steps(fleet: Any) -> None:
    fleet.run({1: [{"op": "set_version", "slot": 2, "state_id": 40, "step_index": 9}]})
    fleet.send(0, {"op": "wait_version", "device": 1, "slot": 2, "state_id": 41, "step_index": 3})
    assert not fleet.has_answered(0, 0.1), "the version of another state must not do"
    fleet.run({1: [{"op": "set_version", "slot": 2, "state_id": 41, "step_index": 2}]})
    assert not fleet.has_answered(0, 0.1), "too few steps must not do"
    fleet.run({1: [{"op": "set_version", "slot": 2, "state_id": 41, "step_index": 4}]})
    assert fleet.results(0) == [[41, 5]]


def test_wait_version_wakes_up_when_only_the_state_changes(fleet: Any) -> None:
    """The low half of the version stays the same here; the sequence is what wakes."""
    fleet.run({3: [{"op": "set_version", "slot": 0, "state_id": 1, "step_index": 0}]})
    fleet.send(2, {"op": "wait_version", "device": 3, "slot": 0, "state_id": 2**32 + 2, "step_index": 0})
    assert not fleet.has_answered(2, 0.05)
    fleet.run({3: [{"op": "set_version", "slot": 0, "state_id": 2, "step_index": 0}]})
    assert fleet.results(2) == [[2, 1]]


def test_wait_version_wants_its_own_buffer(fleet: Any) -> None:
    version = {"slot": 2, "state_id": 51, "step_index": 3}
    fleet.run({1: [{"op": "set_version", "buffer": 0, **version}, {"op": "set_version", "buffer": 2, **version}]})
    fleet.send(0, {"op": "wait_version", "device": 1, "buffer": 1, **version})
    assert not fleet.has_answered(0, 0.05), "other buffers must not do"
    fleet.run({1: [{"op": "set_version", "buffer": 1, **version}]})
    assert fleet.results(0) == [[51, 4]]


def test_abort_frees_one_who_waits_for_a_version(fleet: Any) -> None:
    fleet.send(0, {"op": "wait_version", "device": 1, "slot": 3, "state_id": 77, "step_index": 0})
    assert not fleet.has_answered(0, 0.1)
    fleet.abort.set(0)
    assert "aborted" in fleet.receive(0)


@given(expected=st.integers(0, 2**40), ahead=st.integers(0, 2**31 - 1), behind=st.integers(1, 2**31))
def test_counters_wrap(expected: int, ahead: int, behind: int) -> None:
    assert has_reached((expected + ahead) % 2**32, expected)
    assert not has_reached((expected - behind) % 2**32, expected)


def test_barriers_go_on_when_counters_wrap(spec: ModelSpec) -> None:
    layout = slab_layout([spec], num_devices=2, num_slots=1)
    buffers = [memoryview(bytearray(layout.num_bytes)) for _ in range(2)]
    control = memoryview(bytearray(ControlLayout(num_devices=2).num_bytes))
    both = [PairwiseBarrier(layout, device, buffers, control) for device in range(2)]
    for device in range(2):
        both[device]._barriers[1 - device] = 2**32 - 3
        both[device]._incoming[1 - device].store(2**32 - 3)
    passed = [0, 0]

    def meet(device: int) -> None:
        for _ in range(6):
            both[device].arrive_and_wait((1, 0))
            passed[device] += 1

    threads = [threading.Thread(target=meet, args=(device,), daemon=True) for device in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert passed == [6, 6]
    assert [both[device]._incoming[1 - device].load() for device in range(2)] == [3, 3]
