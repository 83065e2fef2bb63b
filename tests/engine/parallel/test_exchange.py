"""Exchanges between real processes: whatever the groups, the outcome is that of one device alone."""

import time
from copy import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.engine.parallel.lives import Life, Operations, alone, state
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.parallel.cpu.barrier import PairwiseBarrier
from tetrion.engine.parallel.cpu.exchange import CpuExchange
from tetrion.engine.parallel.cpu.slab import SharedSlabs
from tetrion.engine.parallel.exchange import Stream
from tetrion.engine.parallel.group import plan_group
from tetrion.engine.parallel.layout import NUM_BUFFERS, ControlLayout, slab_layout
from tetrion.engine.parallel.words import INVALID_VERSION, slot_version

TEN_ROWS = {"text": [4, 2], "image": 6}
DEVICES = range(4)

groups = st.permutations(DEVICES).flatmap(lambda order: st.integers(1, 4).map(lambda size: order[:size]))
delays_s = st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.0005, 0.003]), min_size=4, max_size=4)
chunks = st.tuples(groups, st.integers(1, 2), delays_s)
texts = st.lists(st.integers(0, 13), min_size=1, max_size=2)
requests = st.fixed_dictionaries(
    {
        "shape": st.fixed_dictionaries({"text": texts, "image": st.integers(4, 100)}),
        "encoder": st.sampled_from(DEVICES),
        "chunks": st.lists(chunks, min_size=1, max_size=5),
    }
)
state_ids = iter(range(1, 1 << 31))


def nothing() -> Operations:
    return {device: [] for device in DEVICES}


@settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(drawn=st.lists(requests, min_size=1, max_size=3), order=st.randoms(use_true_random=False))
def test_any_schedule_gives_the_state_of_one_device(fleet: Any, drawn: list[Any], order: Any) -> None:
    """Several requests grow, shrink and move at once; every member of the last group ends with the same bits."""
    lives = [Life(slot, next(state_ids), it["encoder"], it["shape"]) for slot, it in enumerate(drawn)]
    to_come = [list(it["chunks"]) for it in drawn]
    operations = nothing()
    for life in lives:
        operations[life.holders[0]].append(life.encode())
    while running := [index for index, chunks in enumerate(to_come) if chunks]:
        index = order.choice(running)
        members, chunk_steps, delays = to_come[index].pop(0)
        lives[index].denoise(members, chunk_steps, operations, delays)
    fleet.run(operations)
    for life in lives:
        check(fleet, life)


def check(fleet: Any, life: Life) -> None:
    expected = alone(fleet, life)
    for device in life.holders:
        found = state(fleet, device, life.slot["slot"], life.shape, life.chunk_index)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs), f"device {device}: {(ours - theirs).abs().max()}"


def test_a_device_that_comes_back_early_is_still_pulled_from(fleet: Any) -> None:
    """It gets the fields that never change at once, and keeps its older state until that one's puller is done."""
    life, operations = Life(1, next(state_ids), 0, TEN_ROWS), nothing()
    operations[0].append(life.encode())
    for member, delay_s in ((0, 0.0), (1, 0.3), (0, 0.0)):
        life.denoise([member], 1, operations, [delay_s])
    fleet.run(operations)
    check(fleet, life)


def test_pull_copies_the_state_and_its_version(fleet: Any) -> None:
    shape, slot = {"text": [7, 3], "image": 60}, {"slot": 1, "state_id": 9_000_001}
    fleet.send(2, {"op": "pull", "source": 3, "step_index": 0, "chunk_index": 0, **slot, **shape})
    assert not fleet.has_answered(2, 0.05), "it must wait for the source"
    fleet.run({3: [{"op": "encode", **slot, **shape}]})
    fleet.results(2)
    for ours, theirs in zip(state(fleet, 2, 1, shape), state(fleet, 3, 1, shape), strict=True):
        assert torch.equal(ours, theirs) and ours.any()
    assert fleet.run({0: [{"op": "wait_version", "device": 2, "step_index": 0, **slot}]}) == {0: [[9_000_001, 1]]}


def test_pull_refuses_a_state_that_is_too_far(fleet: Any) -> None:
    fleet.run({3: [{"op": "set_version", "slot": 1, "state_id": 9_000_002, "step_index": 5}]})
    pull = {"op": "pull", "source": 3, "slot": 1, "state_id": 9_000_002, "step_index": 4, "chunk_index": 3}
    fleet.send(2, pull | TEN_ROWS)
    assert "RuntimeError: slot 1 on device 3" in fleet.receive(2)["error"]


@pytest.mark.parametrize("shape", [TEN_ROWS, {"text": [4], "image": 6}], ids=["apart", "one branch"])
def test_an_aborted_chunks_end_is_no_readable_state(fleet: Any, shape: dict[str, Any]) -> None:
    """A member is lost after entry: the other is freed, and what is in its end buffer is not taken for a state."""
    life, operations = Life(2, next(state_ids), 0, shape), nothing()
    fleet.run({0: [life.encode()]})
    life.denoise([0, 1], 1, operations)
    life.denoise([1, 0], 2, operations)
    fleet.send(0, *operations[0])
    fleet.send(1, operations[1][0], {"op": "barrier", "members": [1, 0]})
    fleet.results(1)
    assert not fleet.has_answered(0, 0.1)
    fleet.abort.set(0)
    assert "aborted" in fleet.receive(0)
    end, start = life.chunk_index % NUM_BUFFERS, (life.chunk_index - 1) % NUM_BUFFERS
    assert fleet.version(0, 2, end) == INVALID_VERSION
    assert fleet.version(0, 2, start) == fleet.version(1, 2, start) == slot_version(life.first_state_id, 1)
    fleet.reset()
    again, operations = Life(2, next(state_ids), 3, shape), nothing()
    operations[3].append(again.encode())
    again.denoise([1, 3, 0], 2, operations)
    fleet.run(operations)
    check(fleet, again)


LOST_BARRIERS = 30
"""A chunk of two steps has at most 26, if two branches are evaluated in turn."""
moments = st.one_of(
    st.tuples(st.just("lost"), st.integers(0, 3), st.integers(0, LOST_BARRIERS)),
    st.tuples(st.just("aborted"), st.sampled_from([0.0, 0.0005, 0.002, 0.005])),
)
losses = st.fixed_dictionaries(
    {
        "before": st.lists(chunks, max_size=3),
        "cut_off": st.lists(st.tuples(st.lists(chunks, min_size=1, max_size=2), moments), min_size=1, max_size=3),
        "shape": st.fixed_dictionaries({"text": texts, "image": st.integers(4, 40)}),
        "encoder": st.sampled_from(DEVICES),
        "after": st.lists(chunks, min_size=1, max_size=2),
    }
)


@settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(drawn=losses)
def test_chunks_cut_off_at_any_moment_leave_the_state_before_them(fleet: Any, drawn: Any) -> None:
    """Up to two chunks are in flight when a member is lost or all are aborted, several times in a row. Whatever they
    have left but the state before them is overwritten, versions apart; attempts with other members go on from that."""
    life = Life(2, next(state_ids), drawn["encoder"], drawn["shape"])
    operations = nothing()
    operations[drawn["encoder"]].append(life.encode())
    advance(life, drawn["before"], operations)
    fleet.run(operations)
    for cut_off, moment in drawn["cut_off"]:
        start, whole = copy(life), alone(fleet, life)
        life.slot = life.slot | {"state_id": next(state_ids)}
        operations = nothing()
        advance(life, cut_off, operations)
        cut(fleet, operations, moment)
        life.goes_on_from(start, next(state_ids))
        check_is_whole(fleet, life, whole)
        spoil_all_but_the_start(fleet, life)
    operations = nothing()
    advance(life, drawn["after"], operations)
    fleet.run(operations)
    check(fleet, life)


def advance(life: Life, drawn: Any, operations: Operations) -> None:
    for members, chunk_steps, delays in drawn:
        life.denoise(members, chunk_steps, operations, delays)


def cut(fleet: Any, operations: Operations, moment: Any) -> None:
    """Run these until a member dies after so many barriers, or for so many seconds; then end them on all devices, which
    are idle and reset afterwards."""
    busy = [device for device in DEVICES if operations[device]]
    how, *when = moment
    if how == "lost":
        victim = busy[when[0] % len(busy)]
        operations[victim].insert(0, {"op": "die_after", "num_barriers": when[1]})
    for device in busy:
        fleet.send(device, *operations[device])
    if how == "lost":
        assert "error" not in fleet.receive(victim)
    else:
        time.sleep(when[0])
    for device in busy:
        fleet.abort.set(device)
    for device in busy:
        if how == "aborted" or device != victim:
            assert "error" not in fleet.receive(device)
    fleet.reset()


def check_is_whole(fleet: Any, life: Life, whole: list[torch.Tensor]) -> None:
    """All holders have the state of the chunk that is next, and its version."""
    version = slot_version(life.source_state_id, life.step_index)
    for device in life.holders:
        assert fleet.version(device, life.slot["slot"], life.chunk_index % NUM_BUFFERS) == version
        found = state(fleet, device, life.slot["slot"], life.shape, life.chunk_index)
        assert all(map(torch.equal, found, whole)), f"device {device}"


def spoil_all_but_the_start(fleet: Any, life: Life) -> None:
    """On every device the buffers that the next chunk does not begin with hold nonsense, under the versions they had;
    on those that hold no state all do."""
    for device in DEVICES:
        slabs = SharedSlabs(fleet.layout, device, fleet.buffers)
        for buffer in range(NUM_BUFFERS):
            if device not in life.holders or buffer != life.chunk_index % NUM_BUFFERS:
                slabs.state(device, fleet.spec.name, life.slot["slot"], buffer).fill_(torch.nan)


def test_what_an_earlier_attempt_left_is_not_taken(fleet: Any) -> None:
    """The same slot, buffer and step, another state: whoever wants the new one waits for it."""
    life, operations = Life(1, next(state_ids), 0, TEN_ROWS), nothing()
    operations[0].append(life.encode())
    left = {"op": "set_version", "slot": 1, "state_id": next(state_ids), "step_index": 1, "buffer": 1}
    fleet.run({0: operations[0], 1: [left]})
    life.slot["state_id"], operations = next(state_ids), nothing()
    life.denoise([1], 1, operations)
    life.denoise([3], 1, operations)
    fleet.send(3, *operations[3])
    assert not fleet.has_answered(3, 0.05)
    fleet.run({1: operations[1]})
    fleet.results(3)
    check(fleet, life)


def test_a_newcomer_goes_on_from_one_who_finished_what_others_did_not(fleet: Any) -> None:
    """Device 0 has published the end of a chunk that counts for nothing, since its other member was not heard of: the
    next attempt begins with what 0 has had before."""
    life, operations = Life(1, next(state_ids), 0, {"text": [4], "image": 6}), nothing()
    operations[0].append(life.encode())
    life.denoise([0], 1, operations)
    fleet.run(operations)
    start, operations = copy(life), nothing()
    life.slot = life.slot | {"state_id": next(state_ids)}
    life.denoise([0, 1], 1, operations)
    fleet.run(operations)
    fleet.reset()
    assert fleet.version(0, 1, 2) == slot_version(life.slot["state_id"], 2)
    life.goes_on_from(start, next(state_ids))
    operations = nothing()
    life.denoise([2, 3], 1, operations)
    fleet.run(operations)
    check(fleet, life)


@pytest.mark.parametrize("num_streams", [1, 2])
def test_one_device_attends_like_the_formula(spec: ModelSpec, num_streams: int) -> None:
    """Degree 1 against softmax(q kᵀ / √d) v written out, in float64, with RMSNorm and interleaved rotary embedding."""
    layout = slab_layout([spec], num_devices=1, num_slots=1)
    buffers = [memoryview(bytearray(layout.num_bytes))]
    control = memoryview(bytearray(ControlLayout(num_devices=1).num_bytes))
    slabs, barrier = SharedSlabs(layout, 0, buffers), PairwiseBarrier(layout, 0, buffers, control)
    plan = plan_group((0,), (5, 20), spec.num_heads)
    group = CpuExchange(slabs, barrier, spec).group(plan.shape_of(0))
    group.bind(plan)
    torch.manual_seed(0)
    qkv, norms = torch.randn(25, 3, 6, 8), 1 + 0.1 * torch.randn(num_streams, 2, 8)
    angles = torch.randn(25, 4).repeat_interleave(2, dim=1)
    parts = qkv.split([5, 20]) if num_streams == 2 else (qkv,)
    over = [(0,), (1,)] if num_streams == 2 else [(0, 1)]
    streams = [
        Stream(part.flatten(1), segments, *norm) for part, segments, norm in zip(parts, over, norms, strict=True)
    ]
    group.load_rope((angles[:, ::2].cos(), angles[:, ::2].sin()))
    got = group.attend(streams)
    weights = norms.repeat_interleave(torch.tensor([5, 20] if num_streams == 2 else [25]), dim=0)
    q, k = (rotated(qkv[:, i].double(), weights[:, i].double(), angles.double()) for i in (0, 1))
    scores = torch.einsum("ihd,jhd->hij", q, k) / 8**0.5
    expected = torch.einsum("hij,jhd->ihd", scores.softmax(-1), qkv[:, 2].double()).flatten(1)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)


def rotated(x: torch.Tensor, weight: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """x: [n, H, D]; pairs (2i, 2i + 1) are turned by their angle after RMSNorm."""
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight[:, None]
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
        torch.ones_like(angles[:, None, ::2]), angles[:, None, ::2]
    )
    return torch.view_as_real(turned).flatten(-2)
