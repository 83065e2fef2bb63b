"""GPU workers as real processes: whatever the groups, the latents are, bit for bit, those of one device alone.

They take the host's GPUs in turn (marker `gpu`), with slabs mapped through IPC or in host memory, and chunks as CUDA
graphs; without a GPU their kernels are interpreted.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.engine.parallel.device_fleet import HEAD_DIM, NUM_HEADS, ON_GPU, DeviceFleet, device_layout
from tests.engine.parallel.device_toy import Toy, first_state
from tetrion.engine.parallel.barrier import PairwiseBarrier
from tetrion.engine.parallel.exchange import make_exchange
from tetrion.engine.parallel.layout import ControlLayout
from tetrion.engine.parallel.shared_slab import SharedSlabs
from tetrion.engine.parallel.words import INVALID_VERSION, slot_version

NUM_DEVICES = 3
MEMORY = ["ipc", "host"] if ON_GPU else ["host"]
ITEMSIZE = 2 if ON_GPU else 4
pytestmark = [pytest.mark.gpu] if ON_GPU else []
SHAPE = {"num_text": 5, "num_image": 22}
OTHER_SHAPE = {"num_text": 1, "num_image": 40}
ALONE_SLOT = 3
TOLERANCE = 3e-2 if ON_GPU else 1e-5


@pytest.fixture(scope="module", params=MEMORY)
def shared_fleet(request: pytest.FixtureRequest) -> Iterator[DeviceFleet]:
    fleet = DeviceFleet(NUM_DEVICES, host_memory=request.param == "host", itemsize=ITEMSIZE)
    yield fleet
    fleet.stop()


@pytest.fixture
def fleet(shared_fleet: DeviceFleet) -> DeviceFleet:
    shared_fleet.reset()
    return shared_fleet


class Life:
    """A request's operations, chunk by chunk, for every device that takes part."""

    def __init__(self, slot: int, state_id: int, encoder: int, shape: dict[str, int]) -> None:
        self.slot = {"slot": slot, "state_id": state_id}
        self.shape, self.holders, self.step_index = shape, [encoder], 0

    def encode(self) -> dict[str, Any]:
        return {"op": "encode", **self.slot, **self.shape}

    def denoise(self, members: list[int], chunk_steps: int, operations: dict[int, list[Any]]) -> None:
        chunk = {"op": "denoise", "members": members, "holders": self.holders, "source": self.holders[-1]}
        chunk |= {"step_index": self.step_index, "chunk_steps": chunk_steps, **self.slot, **self.shape}
        for rank, member in enumerate(members):
            operations[member].append(chunk | {"delay_s": 0.01 * (rank % 2)})
        self.holders, self.step_index = members, self.step_index + chunk_steps


def nothing() -> dict[int, list[Any]]:
    return {device: [] for device in range(NUM_DEVICES)}


def run(fleet: DeviceFleet, operations: dict[int, list[Any]]) -> None:
    fleet.run({device: [*own, {"op": "check"}] for device, own in operations.items()})


def state(fleet: DeviceFleet, device: int, slot: int, shape: dict[str, int]) -> list[torch.Tensor]:
    return [torch.tensor(part) for part in fleet.run({device: [{"op": "state", "slot": slot, **shape}]})[device][0]]


def alone(fleet: DeviceFleet, life: Life) -> list[torch.Tensor]:
    """The same request on device 0, from its prompt on."""
    twin, operations = Life(ALONE_SLOT, life.slot["state_id"], 0, life.shape), nothing()
    operations[0].append(twin.encode())
    twin.denoise([0], life.step_index, operations)
    run(fleet, {0: operations[0]})
    return state(fleet, 0, ALONE_SLOT, life.shape)


def on_cpu(life: Life) -> torch.Tensor:
    """The same request by the exchange of CPU workers, in fp32."""
    layout = device_layout(1, itemsize=4)
    buffers = [memoryview(bytearray(layout.num_bytes))]
    control = memoryview(bytearray(ControlLayout(num_devices=1).num_bytes))
    slabs, barrier = SharedSlabs(layout, 0, buffers), PairwiseBarrier(layout, 0, buffers, control)
    num_text, num_image = life.shape["num_text"], life.shape["num_image"]
    exchange = make_exchange(slabs, barrier, (0,), num_text, num_image, NUM_HEADS, HEAD_DIM)
    toy = Toy(num_text, num_image, NUM_HEADS, HEAD_DIM, torch.float32)
    text, pooled, latents = first_state(layout, num_text, num_image, life.slot["state_id"])
    wide_text = torch.nn.functional.pad(text, (0, toy.width - text.shape[1]))
    rope = toy.cos.repeat_interleave(2, dim=1), toy.sin.repeat_interleave(2, dim=1)
    for _ in range(life.step_index):
        latents = toy.step(latents, wide_text, pooled[:1], toy.bias, rope, exchange.attend)
    return latents


SCHEDULES = [
    [([0, 2], 1), ([2, 1, 0], 2), ([1], 1)],
    [([1, 2], 1), ([2, 1], 1), ([0], 1), ([0, 1], 1)],
    [([2, 0, 1], 3), ([0], 5), ([1, 2], 1), ([2], 2), ([0, 2], 7), ([2, 1, 0], 10)],
]


@pytest.mark.parametrize("schedule", SCHEDULES if ON_GPU else SCHEDULES[:2])
def test_any_schedule_gives_the_bits_of_one_device(fleet: DeviceFleet, schedule: list[Any]) -> None:
    life, operations = Life(1, 4000 + len(schedule), 0, SHAPE), nothing()
    operations[0].append(life.encode())
    for members, chunk_steps in schedule:
        life.denoise(members, chunk_steps, operations)
    run(fleet, operations)
    expected, reference = alone(fleet, life), on_cpu(life)
    for device in life.holders:
        for ours, theirs in zip(state(fleet, device, 1, SHAPE), expected, strict=True):
            assert torch.equal(ours, theirs), f"device {device}: {(ours - theirs).abs().max()}"
    error = (expected[2] - reference).norm() / reference.norm()
    assert error < TOLERANCE


def test_requests_alternate_on_the_same_devices(fleet: DeviceFleet) -> None:
    """Disjoint and overlapping groups, two shapes, slots of their own."""
    first, second, operations = Life(0, 5001, 1, SHAPE), Life(2, 5002, 2, OTHER_SHAPE), nothing()
    operations[1].append(first.encode())
    operations[2].append(second.encode())
    for ours, theirs in (([1, 0], [2]), ([0], [1, 2]), ([0, 1, 2], [1])):
        first.denoise(ours, 1, operations)
        second.denoise(theirs, 1, operations)
    run(fleet, operations)
    for life in (first, second):
        expected = alone(fleet, life)
        for device in life.holders:
            assert torch.equal(state(fleet, device, life.slot["slot"], life.shape)[2], expected[2])


def test_pull_copies_the_state_for_a_decode(fleet: DeviceFleet) -> None:
    life, operations = Life(1, 6001, 2, SHAPE), nothing()
    operations[2].append(life.encode())
    operations[0].append({"op": "pull", "source": 2, "step_index": 0, **life.slot, **SHAPE})
    run(fleet, operations)
    for ours, theirs in zip(state(fleet, 0, 1, SHAPE), state(fleet, 2, 1, SHAPE), strict=True):
        assert torch.equal(ours, theirs) and ours.any()
    found = fleet.run({0: [{"op": "version", "slot": 1}]})
    assert found == {0: [slot_version(6001, 0)]}


def test_pull_refuses_a_state_that_is_too_far(fleet: DeviceFleet) -> None:
    life, operations = Life(1, 6002, 2, SHAPE), nothing()
    operations[2].append(life.encode())
    life.denoise([2], 2, operations)
    run(fleet, operations)
    fleet.send(0, {"op": "pull", "source": 2, "step_index": 1, **life.slot, **SHAPE}, {"op": "check"})
    assert "RuntimeError: the slot that state was pulled from" in fleet.receive(0)["error"]
    run(fleet, {0: [life.encode()]})  # one request's mistake is not another's


def test_an_abort_ends_a_wait_and_nothing_is_published(fleet: DeviceFleet) -> None:
    """Device 1 never comes. Device 0's state stays as it was before it entered; device 2's as it was, too."""
    life, other, operations = Life(1, 7001, 0, SHAPE), Life(2, 7002, 2, SHAPE), nothing()
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
    found = fleet.run({d: [{"op": "version", "slot": 1}] for d in (0, 2)})
    assert found[0] == [slot_version(7001, 0)]
    fleet.send(0, other.encode(), {"op": "check"})
    assert "aborted" in fleet.receive(0), "an aborted device must not go on before it is reset"
    fleet.reset()
    assert fleet.run({d: [{"op": "counts"}] for d in range(NUM_DEVICES)}) == {d: [[0, 0, 0]] for d in range(3)}
    assert_all_work(fleet, 7003)


def test_a_chunk_aborted_half_way_leaves_no_readable_state(fleet: DeviceFleet) -> None:
    """Device 1 enters and leaves after one step of two."""
    life, operations = Life(1, 7101, 0, SHAPE), nothing()
    operations[0].append(life.encode())
    run(fleet, operations)
    operations = nothing()
    life.denoise([0, 1], 2, operations)
    (short,) = operations[1]
    fleet.send(0, *operations[0], {"op": "check"})
    fleet.send(1, short | {"chunk_steps": 1}, {"op": "check"})
    fleet.results(1)
    assert not fleet.has_answered(0, 0.5)
    fleet.abort.set(0)
    assert "aborted" in fleet.receive(0)
    assert fleet.run({0: [{"op": "version", "slot": 1}]}) == {0: [INVALID_VERSION]}
    fleet.reset()
    assert_all_work(fleet, 7102)


def assert_all_work(fleet: DeviceFleet, state_id: int) -> None:
    life, operations = Life(1, state_id, 1, SHAPE), nothing()
    operations[1].append(life.encode())
    life.denoise([2, 0, 1], 1, operations)
    run(fleet, operations)
    expected = alone(fleet, life)
    for device in range(NUM_DEVICES):
        assert torch.equal(state(fleet, device, 1, SHAPE)[2], expected[2])


def test_a_killed_peer_is_survived_and_replaced(fleet: DeviceFleet) -> None:
    life, operations = Life(1, 8001, 0, SHAPE), nothing()
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
    pair, operations = Life(0, 8002, 2, OTHER_SHAPE), nothing()
    operations[2].append(pair.encode())
    pair.denoise([2, 0], 2, operations)
    run(fleet, {device: operations[device] for device in (0, 2)})
    expected = alone(fleet, pair)
    assert all(torch.equal(state(fleet, device, 0, OTHER_SHAPE)[2], expected[2]) for device in (0, 2))
    fleet.replace(1)
    assert_all_work(fleet, 8003)
