"""GPU workers as real processes: whatever the groups, the latents are, bit for bit, those of one device alone.

They take the host's GPUs in turn (marker `gpu`), with slabs mapped through IPC or in host memory, and chunks as CUDA
graphs; without a GPU their kernels are interpreted.
"""

import itertools
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.engine.parallel.device_fleet import ON_GPU, DeviceFleet, device_spec
from tests.engine.parallel.lives import Life, Operations, alone, in_this_process, state
from tetrion.engine.parallel.words import INVALID_VERSION, slot_version

NUM_DEVICES = 4
MEMORY = ["ipc", "host"] if ON_GPU else ["host"]
ITEMSIZE = 2 if ON_GPU else 4
pytestmark = [pytest.mark.gpu] if ON_GPU else []
SHAPE = {"text": [5], "image": 22}
OTHER_SHAPE = {"text": [1], "image": 40}
GUIDED = {"text": [5, 3], "image": 22}
SAME_TEXT = {"text": [6, 6], "image": 9}
NO_TEXT = {"text": [7, 0], "image": 13}
TOLERANCE, STEPS_TOLERATED = 3e-2 if ON_GPU else 1e-5, 6
IDS = itertools.count(1000)
"""Of states: an earlier test's may still be in a slot, further than what is pulled."""


@pytest.fixture(scope="module", params=MEMORY)
def shared_fleet(request: pytest.FixtureRequest) -> Iterator[DeviceFleet]:
    fleet = DeviceFleet(NUM_DEVICES, host_memory=request.param == "host", itemsize=ITEMSIZE)
    yield fleet
    fleet.stop()


@pytest.fixture
def fleet(shared_fleet: DeviceFleet) -> DeviceFleet:
    shared_fleet.reset()
    return shared_fleet


def nothing() -> Operations:
    return {device: [] for device in range(NUM_DEVICES)}


def run(fleet: DeviceFleet, operations: Operations) -> None:
    fleet.run({device: [*own, {"op": "check"}] for device, own in operations.items()})


def versions(fleet: DeviceFleet, devices: Sequence[int], slot: int) -> dict[int, list[int]]:
    """Of the slot's buffers on each device."""
    found = fleet.run({device: [{"op": "versions", "slot": slot}] for device in devices})
    return {device: result for device, (result,) in found.items()}


CASES = [(degree, shape) for degree in (1, 2, 3, 4) for shape in (SHAPE, GUIDED, NO_TEXT)]
QUICK_CASES = [(1, SHAPE), (3, SHAPE), (4, SHAPE), (2, GUIDED), (3, GUIDED), (4, GUIDED), (2, NO_TEXT)]


@pytest.mark.parametrize(("degree", "shape"), CASES if ON_GPU else QUICK_CASES, ids=str)
def test_any_degree_gives_the_bits_of_one_device(fleet: DeviceFleet, degree: int, shape: dict[str, Any]) -> None:
    """With two branches 2 and 4 are apart, 3 in turn."""
    life, operations = Life(2, next(IDS), 1, shape), nothing()
    operations[1].append(life.encode())
    life.denoise([3, 1, 0, 2][:degree], 1, operations)
    run(fleet, operations)
    check(fleet, life)


def check(fleet: DeviceFleet, life: Life) -> None:
    """Every holder has the bits of one device, which has the arithmetic of a CPU worker."""
    expected, reference = alone(fleet, life), in_this_process(device_spec(), life)
    tolerance = TOLERANCE * max(1.0, life.step_index / STEPS_TOLERATED)  # what is rounded adds up
    for device in life.holders:
        found = state(fleet, device, life.slot["slot"], life.shape, life.chunk_index)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs), f"device {device}: {(ours - theirs).abs().max()}"
    for ours, theirs in zip(expected, reference, strict=True):
        assert (ours.view_as(theirs) - theirs).norm() <= tolerance * theirs.norm()


SCHEDULES: list[tuple[dict[str, Any], list[tuple[list[int], int]]]] = [
    (SHAPE, [([0, 2], 1), ([2, 1, 0], 2), ([3], 1)]),
    (GUIDED, [([1, 2], 1), ([0], 1), ([3, 2, 1, 0], 1), ([0, 1, 2], 1), ([2, 1], 1)]),
    (GUIDED, [([2, 0, 1], 3), ([0], 5), ([1, 2], 1), ([2], 2), ([0, 2], 7), ([2, 1, 0, 3], 10)]),
]


@pytest.mark.parametrize(("shape", "schedule"), SCHEDULES if ON_GPU else SCHEDULES[:2])
def test_any_schedule_gives_the_bits_of_one_device(
    fleet: DeviceFleet, shape: dict[str, Any], schedule: list[tuple[list[int], int]]
) -> None:
    """Groups grow, shrink and move; newcomers pull from members and from devices that have left."""
    life, operations = Life(1, next(IDS), 0, shape), nothing()
    operations[0].append(life.encode())
    for members, chunk_steps in schedule:
        life.denoise(members, chunk_steps, operations)
    run(fleet, operations)
    check(fleet, life)


def test_turned_pictures_of_one_size_do_not_share_what_is_theirs(fleet: DeviceFleet) -> None:
    """The same shapes, in turn and apart: what a shape has in one place is another's every time."""
    first, second, operations = (
        Life(0, next(IDS), 0, SAME_TEXT),
        Life(1, next(IDS), 0, SAME_TEXT | {"turned": 1}),
        nothing(),
    )
    operations[0] += [first.encode(), second.encode()]
    for ours, theirs in (([0, 1], [1, 0]), ([0, 1], [0, 1]), ([1, 0], [1])):
        first.denoise(ours, 1, operations)
        second.denoise(theirs, 1, operations)
    run(fleet, operations)
    check(fleet, first)
    check(fleet, second)


def test_requests_alternate_on_the_same_devices(fleet: DeviceFleet) -> None:
    """Disjoint and overlapping groups, two shapes, slots of their own."""
    first, second, operations = Life(0, next(IDS), 1, GUIDED), Life(2, next(IDS), 2, OTHER_SHAPE), nothing()
    operations[1].append(first.encode())
    operations[2].append(second.encode())
    for ours, theirs in (([1, 0], [2]), ([0], [1, 2]), ([0, 1, 2], [1])):
        first.denoise(ours, 1, operations)
        second.denoise(theirs, 1, operations)
    run(fleet, operations)
    check(fleet, first)
    check(fleet, second)


def test_pull_copies_the_state_for_a_decode(fleet: DeviceFleet) -> None:
    life, operations = Life(1, next(IDS), 2, GUIDED), nothing()
    operations[2].append(life.encode())
    operations[0].append({"op": "pull", "source": 2, "step_index": 0, "chunk_index": 0, **life.slot, **GUIDED})
    run(fleet, operations)
    for ours, theirs in zip(state(fleet, 0, 1, GUIDED), state(fleet, 2, 1, GUIDED), strict=True):
        assert torch.equal(ours, theirs) and ours.any()
    assert versions(fleet, [0], 1)[0][0] == slot_version(life.slot["state_id"], 0)


def test_pull_refuses_a_state_that_is_too_far(fleet: DeviceFleet) -> None:
    life, operations = Life(1, next(IDS), 2, SHAPE), nothing()
    operations[2].append(life.encode())
    life.denoise([2], 2, operations)
    run(fleet, operations)
    pull = {"op": "pull", "source": 2, "step_index": 1, "chunk_index": life.chunk_index}
    fleet.send(0, pull | life.slot | SHAPE, {"op": "check"})
    assert "RuntimeError: the slot that state was pulled from" in fleet.receive(0)["error"]
    run(fleet, {0: [life.encode()]})  # one request's mistake is not another's


def test_an_abort_ends_a_wait_and_nothing_is_published(fleet: DeviceFleet) -> None:
    """Device 1 never comes. Device 0's state stays as it was before it entered; device 2's as it was, too."""
    life, other, operations = Life(1, next(IDS), 0, SHAPE), Life(2, next(IDS), 2, SHAPE), nothing()
    operations[0].append(life.encode())
    operations[2].append(other.encode())
    run(fleet, operations)
    before = state(fleet, 0, 1, SHAPE), state(fleet, 2, 2, SHAPE)
    operations = nothing()
    life.denoise([0, 1, 2], 2, operations)
    for device in (0, 2):
        fleet.send(device, *operations[device], {"op": "check"})
    assert not fleet.has_answered(0, 1.0) and not fleet.has_answered(2, 0.0)
    for device in (0, 2):
        fleet.abort.set(device)
    assert "aborted" in fleet.receive(0) and "aborted" in fleet.receive(2)
    for old, new in zip(before, (state(fleet, 0, 1, SHAPE), state(fleet, 2, 2, SHAPE)), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(old, new, strict=True))
    assert versions(fleet, [0], 1)[0][0] == slot_version(life.first_state_id, 0)
    fleet.send(0, other.encode(), {"op": "check"})
    assert "aborted" in fleet.receive(0), "an aborted device must not go on before it is reset"
    fleet.reset()
    nobody = [0] * NUM_DEVICES
    assert fleet.run({d: [{"op": "counts"}] for d in range(NUM_DEVICES)}) == {d: [nobody] for d in range(NUM_DEVICES)}
    assert_all_work(fleet)


LEAVERS = {
    "in turn": ([0, 1, 2], 2),  # waits at barrier A of the second step's first layer
    "apart, part of one": ([0, 1], 1),  # its partner waits at barrier C
    "apart, same part": ([0, 1, 2, 3], 1),
    "apart, other part": ([0, 2, 1, 3], 1),
}


@pytest.mark.parametrize("case", LEAVERS)
def test_a_chunk_aborted_half_way_leaves_the_state_before_it(fleet: DeviceFleet, case: str) -> None:
    """Device 1 enters and leaves after one step of two: everybody else waits for it, or for somebody who does. Another
    attempt, by others, goes on from where the chunk began."""
    members, _ = LEAVERS[case]
    life, operations = Life(1, next(IDS), 0, GUIDED), nothing()
    operations[0].append(life.encode())
    run(fleet, operations)
    whole, start, operations = state(fleet, 0, 1, GUIDED), copy(life), nothing()
    life.denoise(members, 2, operations)
    (short,) = operations[1]
    others = [member for member in members if member != 1]
    for device in others:
        fleet.send(device, *operations[device], {"op": "check"})
    fleet.send(1, short | {"chunk_steps": 1}, {"op": "check"})
    assert not fleet.has_answered(others[0], 1.0) and not any(fleet.has_answered(device, 0.0) for device in others)
    for device in members:
        fleet.abort.set(device)
    answers = [fleet.receive(device) for device in members]
    assert all("aborted" in answer for device, answer in zip(members, answers, strict=True) if device != 1)
    for device, found in versions(fleet, others, 1).items():
        assert found[:2] == [slot_version(life.first_state_id, 0), INVALID_VERSION]
        assert all(map(torch.equal, state(fleet, device, 1, GUIDED), whole)), f"device {device}"
    fleet.reset()
    life.goes_on_from(start, next(IDS))
    operations = nothing()
    life.holders = others[-1:]  # a newcomer of the lost chunk, if it had more than two members
    life.denoise([3, 0], 1, operations)
    run(fleet, operations)
    check(fleet, life)


def test_a_newcomer_goes_on_from_one_who_finished_what_others_did_not(fleet: DeviceFleet) -> None:
    """Device 0 has published the end of an attempt that came to nothing, and has the state before it all the same."""
    life, operations = Life(1, next(IDS), 0, GUIDED), nothing()
    operations[0].append(life.encode())
    life.denoise([0], 1, operations)
    lost = {"slot": 1, "state_id": next(IDS), "step_index": 2}
    operations[0] += [{"op": "set_version", "buffer": 2, **lost}, {"op": "set_version", "buffer": 0, **lost}]
    life.slot["state_id"] = next(IDS)
    life.denoise([2, 1], 1, operations)
    run(fleet, operations)
    check(fleet, life)


@pytest.mark.parametrize("pulled", ["constants", "state"])
def test_an_abort_ends_a_newcomers_wait_for_its_source(fleet: DeviceFleet, pulled: str) -> None:
    """Device 2 has another request's state, or has this one's but not that far."""
    life, operations = Life(1, next(IDS), 2, GUIDED), nothing()
    if pulled == "state":
        operations[2].append(life.encode())
        run(fleet, {2: operations[2]})
    pull = {"op": "pull", "source": 2, "step_index": 1, "chunk_index": 1}
    fleet.send(0, pull | life.slot | GUIDED, {"op": "check"})
    assert not fleet.has_answered(0, 0.5)
    fleet.abort.set(0)
    assert "aborted" in fleet.receive(0)
    assert slot_version(life.slot["state_id"], 1) not in versions(fleet, [0], 1)[0]
    fleet.reset()
    assert_all_work(fleet)


def assert_all_work(fleet: DeviceFleet) -> None:
    life, operations = Life(1, next(IDS), 1, GUIDED), nothing()
    operations[1].append(life.encode())
    life.denoise([2, 0, 1, 3], 1, operations)
    run(fleet, operations)
    check(fleet, life)


def test_a_killed_peer_is_survived_and_replaced(fleet: DeviceFleet) -> None:
    life, operations = Life(1, next(IDS), 0, SHAPE), nothing()
    operations[0].append(life.encode())
    run(fleet, operations)
    operations = nothing()
    life.denoise([0, 1, 2], 1, operations)
    for device in (0, 2):
        fleet.send(device, *operations[device], {"op": "check"})
    fleet.kill(1)
    assert not fleet.has_answered(0, 0.5)
    for device in (0, 2):
        fleet.abort.set(device)
    assert all("aborted" in fleet.receive(device) for device in (0, 2))
    fleet.run({device: [{"op": "reset"}] for device in (0, 2)})
    pair, operations = Life(0, next(IDS), 2, OTHER_SHAPE), nothing()
    operations[2].append(pair.encode())
    pair.denoise([2, 0], 2, operations)
    run(fleet, {device: operations[device] for device in (0, 2)})
    check(fleet, pair)
    fleet.replace(1)
    assert_all_work(fleet)
