"""CPU exchanges between real processes, any segments and branches: the outcome is that of one device, to the bit."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.engine.parallel.segments_fleet import SegmentsFleet
from tests.engine.parallel.toy_models import SPECS
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.parallel.cpu.barrier import PairwiseBarrier
from tetrion.engine.parallel.cpu.exchange import CpuExchange
from tetrion.engine.parallel.cpu.slab import SharedSlabs
from tetrion.engine.parallel.exchange import Stream
from tetrion.engine.parallel.group import GroupShape, plan_group
from tetrion.engine.parallel.layout import NUM_BUFFERS, ControlLayout, slab_layout
from tetrion.engine.parallel.words import INVALID_VERSION, slot_version
from tetrion.engine.shape import StepShape

ALONE_SLOT = 3
DEVICES = range(4)
ONE_BRANCH = StepShape(width=0, height=0, image=6, text=(4,))
TWO_BRANCHES = StepShape(width=0, height=0, image=6, text=(4, 3))
LAYERS_OF_TOY = 4
START, END = 0, 1
"""Buffers of a request's first chunk."""

Operations = dict[int, list[dict[str, Any]]]
groups = st.permutations(DEVICES).flatmap(lambda order: st.integers(1, 4).map(lambda size: order[:size]))
delays_s = st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.0005, 0.003]), min_size=4, max_size=4)
chunks = st.tuples(groups, st.integers(1, 2), delays_s)
shapes = st.builds(
    StepShape,
    width=st.just(0),
    height=st.just(0),
    image=st.integers(4, 100),
    text=st.lists(st.integers(0, 13), min_size=1, max_size=2).map(tuple),
    reference=st.integers(0, 20),
)
requests = st.fixed_dictionaries(
    {
        "model": st.sampled_from(sorted(SPECS)),
        "shape": shapes,
        "encoder": st.sampled_from(DEVICES),
        "chunks": st.lists(chunks, min_size=1, max_size=5),
    }
)
state_ids = iter(range(1, 1 << 31))


@pytest.fixture(scope="module")
def shared_fleet() -> Iterator[SegmentsFleet]:
    fleet = SegmentsFleet()
    yield fleet
    fleet.stop()


@pytest.fixture
def fleet(shared_fleet: SegmentsFleet) -> SegmentsFleet:
    shared_fleet.reset()
    return shared_fleet


class Life:
    """One request on its way through a schedule: which chunk is next, and who holds its state."""

    def __init__(
        self, slot: int, model: str, shape: StepShape, encoder: int, chunks: Any = (), state_id: int | None = None
    ) -> None:
        self.slot, self.model, self.shape, self.chunks = slot, model, shape, list(chunks)
        self.state_id = next(state_ids) if state_id is None else state_id
        self.holders, self.step_index, self.chunk_index = [encoder], 0, 0

    @property
    def request(self) -> dict[str, Any]:
        shape = msgspec.to_builtins(self.shape)
        return {"model": self.model, "shape": shape, "slot": self.slot, "state_id": self.state_id}

    def encode(self) -> dict[str, Any]:
        return {"op": "encode", **self.request}

    def pull(self, source: int, *what: str) -> dict[str, Any]:
        place = {"step_index": self.step_index, "chunk_index": self.chunk_index}
        return {"op": "pull", "source": source, "what": what, **place, **self.request}

    def denoise(
        self, members: list[int], chunk_steps: int, operations: Operations, delays: list[float] | None = None
    ) -> None:
        for device in members:
            operations[device].append(
                {
                    "op": "denoise", "members": members, "holders": self.holders, "source": self.holders[-1],
                    "step_index": self.step_index, "chunk_index": self.chunk_index, "chunk_steps": chunk_steps,
                    "delay_s": delays[device] if delays else 0.0, **self.request,
                }
            )  # fmt: skip
        self.holders, self.step_index = members, self.step_index + chunk_steps
        self.chunk_index += 1


def no_operations() -> Operations:
    return {device: [] for device in DEVICES}


def assert_all_hold_what_one_device_computes(fleet: SegmentsFleet, life: Life) -> None:
    expected = alone(fleet, life)
    for device in life.holders:
        for name, found in fleet.state(device, life.model, life.slot, life.shape, life.chunk_index).items():
            assert torch.equal(found, expected[name]), f"{name} on {device}"


def alone(fleet: SegmentsFleet, life: Life) -> dict[str, Tensor]:
    """The same request at degree 1 on device 0, from the prompt on."""
    twin = Life(ALONE_SLOT, life.model, life.shape, encoder=0, state_id=life.state_id)
    operations: Operations = {0: [twin.encode()]}
    if life.step_index:
        twin.denoise([0], life.step_index, operations)
    fleet.run(operations)
    return fleet.state(0, life.model, ALONE_SLOT, life.shape, twin.chunk_index)


@settings(
    max_examples=40,
    deadline=None,
    phases=[Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(drawn=st.lists(requests, min_size=1, max_size=3), order=st.randoms(use_true_random=False))
def test_any_schedule_gives_the_state_of_one_device(fleet: SegmentsFleet, drawn: list[Any], order: Any) -> None:
    """Requests of several models grow, shrink and move at once, their branches in turn or apart as degrees allow; every
    member of the last group ends with the same fields."""
    lives = [Life(slot, **request) for slot, request in enumerate(drawn)]
    operations = no_operations()
    for life in lives:
        operations[life.holders[0]].append(life.encode())
    while running := [life for life in lives if life.chunks]:
        life = order.choice(running)
        members, chunk_steps, delays = life.chunks.pop(0)
        life.denoise(members, chunk_steps, operations, delays)
    fleet.run(operations)
    for life in lives:
        assert_all_hold_what_one_device_computes(fleet, life)


@pytest.mark.parametrize("model", sorted(SPECS))
@pytest.mark.parametrize("text", [(5,), (5, 13)])
@pytest.mark.parametrize("members", [[2], [1, 3], [2, 0, 1], [3, 1, 2, 0]])
def test_every_degree_and_layout_gives_the_state_of_one_device(
    fleet: SegmentsFleet, model: str, text: tuple[int, ...], members: list[int]
) -> None:
    """Heads (6, 4, 5) and rows do not divide evenly; groups of 2 and 4 have two branches apart, others in turn."""
    life = Life(0, model, StepShape(width=0, height=0, image=31, text=text, reference=7), encoder=1)
    operations = no_operations()
    operations[1].append(life.encode())
    life.denoise(members, 3, operations)
    fleet.run(operations)
    assert_all_hold_what_one_device_computes(fleet, life)


def test_a_pull_copies_all_fields_of_all_branches_and_the_version(fleet: SegmentsFleet) -> None:
    shape = StepShape(width=0, height=0, image=60, text=(7, 9), reference=11)
    life = Life(1, "three segments", shape, encoder=3)
    fleet.send(2, life.pull(3, "constants", "state"))
    assert not fleet.has_answered(2, 0.05), "it must wait for the source"
    fleet.run({3: [life.encode()]})
    fleet.results(2)
    ours, theirs = (fleet.state(device, life.model, 1, shape) for device in (2, 3))
    assert len(ours) == 6
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]) and tensor.any(), name
    waited = {"op": "wait_version", "device": 2, "slot": 1, "state_id": life.state_id, "step_index": 0}
    assert fleet.run({0: [waited]}) == {0: [[life.state_id, 1]]}


def test_a_pull_refuses_a_state_that_is_too_far(fleet: SegmentsFleet) -> None:
    life = Life(1, "two segments", ONE_BRANCH, encoder=3)
    fleet.run({3: [{"op": "set_version", "slot": 1, "state_id": life.state_id, "step_index": 5}]})
    life.step_index = 4
    fleet.send(2, life.pull(3, "state"))
    assert "RuntimeError: slot 1 on device 3" in fleet.receive(2)["error"]


def test_constants_are_pulled_in_the_midst_of_a_chunk_and_the_state_after_it(fleet: SegmentsFleet) -> None:
    """Device 0 has entered a chunk and waits for its partner; 2 needs what never changes, then the chunk's outcome."""
    life = Life(2, "three segments", StepShape(width=0, height=0, image=9, text=(5, 2), reference=3), encoder=0)
    fleet.run({0: [life.encode()]})
    expected, operations = fleet.state(0, life.model, 2, life.shape), no_operations()
    life.denoise([0, 1], 1, operations)
    fleet.send(0, *operations[0])
    fleet.run({1: [{"op": "barrier", "members": [0, 1]}]})
    fleet.wait_for_arrival(0, 1, 2)
    assert fleet.version(0, life.slot, END) == INVALID_VERSION
    fleet.run({2: [life.pull(0, "constants")]})
    found = fleet.state(2, life.model, 2, life.shape)
    for name in ("text 0", "text 1", "pooled 0", "pooled 1", "reference 0"):
        assert torch.equal(found[name], expected[name]), name
    assert all(fleet.version(2, life.slot, buffer) >> 32 != life.state_id for buffer in range(NUM_BUFFERS))
    fleet.send(2, life.pull(0, "state"))
    assert not fleet.has_answered(2, 0.05), "the chunk's outcome is not there yet"
    for device in (0, 2):
        fleet.abort.set(device)
        assert "aborted" in fleet.receive(device)


def test_a_member_that_comes_back_keeps_its_state_until_others_have_pulled_it(fleet: SegmentsFleet) -> None:
    """Device 1 is through with its part and already waits to pull again, while 2 has not yet pulled from it."""
    life, operations = Life(1, "two segments", ONE_BRANCH, encoder=1), no_operations()
    fleet.run({1: [life.encode()]})
    life.denoise([2], 1, operations)
    life.denoise([1], 1, operations)
    fleet.send(1, *operations[1])
    assert not fleet.has_answered(1, 0.05), "device 2 has no state yet"
    fleet.run({2: operations[2]})
    fleet.results(1)
    assert_all_hold_what_one_device_computes(fleet, life)


def test_a_successor_pulls_while_the_source_still_runs(fleet: SegmentsFleet) -> None:
    """All chunks are queued at once: whoever is new pulls constants early and the state when it is complete."""
    life = Life(0, "two segments", StepShape(width=0, height=0, image=40, text=(5, 6)), encoder=0)
    operations = no_operations()
    operations[0].append(life.encode())
    for members in ([0, 1], [2, 1, 3, 0], [3], [1, 2, 0], [2, 3]):
        life.denoise(members, 2, operations)
    fleet.run(operations)
    assert_all_hold_what_one_device_computes(fleet, life)


def barriers_of(shape: StepShape) -> int:
    """How often two members meet in a chunk of one step."""
    if shape.num_branches == 2:
        return 3  # entry, velocities pushed, velocities read
    return 1 + 2 * LAYERS_OF_TOY + 1  # entry, two a layer, the state shared


@pytest.mark.parametrize(
    ("shape", "passed"),
    [(shape, n) for shape in (ONE_BRANCH, TWO_BRANCHES) for n in range(barriers_of(shape))],
)
def test_an_abort_ends_every_wait_of_a_chunk_and_leaves_the_state_before_it(
    fleet: SegmentsFleet, shape: StepShape, passed: int
) -> None:
    """The partner is lost after so many barriers: the other is freed, has what it had, and nothing new."""
    life = Life(2, "two segments", shape, encoder=0)
    fleet.run({0: [life.encode(), {"op": "set_version", "slot": 2, "state_id": 1, "step_index": 1, "buffer": END}]})
    before, operations = fleet.state(0, life.model, life.slot, shape), no_operations()
    older = fleet.version(0, life.slot, END)
    life.denoise([0, 1], 1, operations)
    fleet.send(0, *operations[0])
    fleet.run({1: [{"op": "barrier", "members": [1, 0]}] * passed})
    fleet.wait_for_arrival(0, 1, passed + 1)
    assert fleet.version(0, life.slot, END) == (INVALID_VERSION if passed else older)
    fleet.abort.set(0)
    assert "aborted" in fleet.receive(0)
    assert fleet.version(0, life.slot, END) == (INVALID_VERSION if passed else older)
    assert fleet.version(0, life.slot, START) == slot_version(life.state_id, 0)
    after = fleet.state(0, life.model, life.slot, shape)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    fleet.reset()
    again, operations = Life(2, "two segments", shape, encoder=3), no_operations()
    operations[3].append(again.encode())
    again.denoise([1, 3, 0, 2], 2, operations)
    fleet.run(operations)
    assert_all_hold_what_one_device_computes(fleet, again)


@pytest.mark.parametrize("what", ["constants", "state"])
def test_an_abort_ends_a_pull_that_waits(fleet: SegmentsFleet, what: str) -> None:
    life = Life(2, "two segments", ONE_BRANCH, encoder=1)
    fleet.send(0, life.pull(1, what))
    assert not fleet.has_answered(0, 0.05)
    fleet.abort.set(0)
    assert "aborted" in fleet.receive(0)
    assert all(fleet.version(0, life.slot, buffer) >> 32 != life.state_id for buffer in range(NUM_BUFFERS))


@pytest.mark.parametrize("num_streams", [1, 2])
def test_one_device_attends_like_the_formula(spec: ModelSpec, num_streams: int) -> None:
    """Degree 1 against softmax(q kᵀ / √d) v written out, in float64, with RMSNorm and interleaved rotary embedding."""
    exchange = lone_exchange(spec)
    torch.manual_seed(0)
    qkv, norms, angles = torch.randn(25, 3, 6, 8), 1 + 0.1 * torch.randn(num_streams, 2, 8), torch.randn(25, 4)
    parts = qkv.split([5, 20]) if num_streams == 2 else (qkv,)
    segments = [(0,), (1,)] if num_streams == 2 else [(0, 1)]
    streams = [Stream(part.flatten(1), own, *norm) for part, own, norm in zip(parts, segments, norms, strict=True)]
    group = exchange.group(GroupShape((5, 20), 1, spec.num_heads))
    group.bind(plan_group((0,), (5, 20), spec.num_heads))
    group.load_rope((angles.cos(), angles.sin()))
    got = group.attend(streams)
    weights = norms.repeat_interleave(torch.tensor([5, 20] if num_streams == 2 else [25]), dim=0)
    q, k = (rotated(normed(qkv[:, i].double(), weights[:, i].double()), angles.double()) for i in (0, 1))
    torch.testing.assert_close(got.double(), attended(q, k, qkv[:, 2].double()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("has_rope", [True, False])
def test_a_subset_of_segments_attends_to_itself_alone(spec: ModelSpec, has_norm: bool, has_rope: bool) -> None:
    exchange = lone_exchange(spec)
    torch.manual_seed(0)
    qkv, weights, angles = torch.randn(20, 3, 6, 8), 1 + 0.1 * torch.randn(2, 8), torch.randn(25, 4)
    group = exchange.group(GroupShape((5, 20), 1, spec.num_heads))
    group.bind(plan_group((0,), (5, 20), spec.num_heads))
    group.load_rope((angles.cos(), angles.sin()))
    got = group.attend([Stream(qkv.flatten(1), (1,), *(weights if has_norm else (None, None)), has_rope=has_rope)])
    q, k = qkv[:, 0].double(), qkv[:, 1].double()
    if has_norm:
        q, k = (normed(x, weight.double().expand(20, 8)) for x, weight in zip((q, k), weights, strict=True))
    if has_rope:
        q, k = (rotated(x, angles[5:].double()) for x in (q, k))
    torch.testing.assert_close(got.double(), attended(q, k, qkv[:, 2].double()), rtol=0, atol=1e-5)


def lone_exchange(spec: ModelSpec) -> CpuExchange:
    return exchange_over(spec, [memoryview(bytearray(slab_layout([spec], 1, 1).num_bytes))])


def exchange_over(spec: ModelSpec, buffers: list[memoryview]) -> CpuExchange:
    """Device 0's."""
    layout = slab_layout([spec], num_devices=len(buffers), num_slots=1)
    control = memoryview(bytearray(ControlLayout(num_devices=len(buffers)).num_bytes))
    barrier = PairwiseBarrier(layout, 0, buffers, control)
    return CpuExchange(SharedSlabs(layout, 0, buffers), barrier, spec)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    """x: [n, H, D]; weight: [n, D]."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight[:, None]


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """x: [n, H, D]; pairs (2i, 2i + 1) are turned by angles [n, D / 2]."""
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
        torch.ones_like(angles), angles
    ).unsqueeze(1)
    return torch.view_as_real(turned).flatten(-2)
