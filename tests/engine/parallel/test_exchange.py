"""Exchanges between real processes: whatever the groups, the outcome is that of one device alone."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.parallel.barrier import PairwiseBarrier
from tetrion.engine.parallel.exchange import Stream, make_exchange
from tetrion.engine.parallel.layout import ControlLayout, slab_layout
from tetrion.engine.parallel.shared_slab import SharedSlabs
from tetrion.engine.parallel.words import INVALID_VERSION

TOLERANCE = 1e-6
ALONE_SLOT = 3
TEN_TOKENS = {"num_text": 4, "num_image": 6}
DEVICES = range(4)

Operations = dict[int, list[dict[str, Any]]]
groups = st.permutations(DEVICES).flatmap(lambda order: st.integers(1, 4).map(lambda size: order[:size]))
delays_s = st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.0005, 0.003]), min_size=4, max_size=4)
chunks = st.tuples(groups, st.integers(1, 2), delays_s)
requests = st.fixed_dictionaries(
    {
        "num_text": st.integers(0, 13),
        "num_image": st.integers(4, 100),
        "num_heads": st.integers(4, 6),
        "encoder": st.sampled_from(DEVICES),
        "chunks": st.lists(chunks, min_size=1, max_size=5),
    }
)
state_ids = iter(range(1, 1 << 31))


class Life:
    """One request on its way through a schedule: which chunk is next, and who holds its state."""

    def __init__(self, slot: int, request: dict[str, Any]) -> None:
        self.slot, self.chunks, self.state_id = slot, list(request["chunks"]), next(state_ids)
        self.shape = {name: request[name] for name in ("num_text", "num_image")}
        self.num_heads, self.holders, self.step_index = request["num_heads"], [request["encoder"]], 0

    def encode(self) -> dict[str, Any]:
        return {"op": "encode", "slot": self.slot, "state_id": self.state_id, **self.shape}

    def denoise(self, members: list[int], chunk_steps: int, delays: list[float], operations: Operations) -> None:
        for device in members:
            operations[device].append(
                {
                    "op": "denoise", "members": members, "holders": self.holders, "source": self.holders[-1],
                    "slot": self.slot, "state_id": self.state_id, "step_index": self.step_index,
                    "chunk_steps": chunk_steps, "num_heads": self.num_heads, "delay_s": delays[device], **self.shape,
                }
            )  # fmt: skip
        self.holders, self.step_index = members, self.step_index + chunk_steps


@settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(drawn=st.lists(requests, min_size=1, max_size=3), order=st.randoms(use_true_random=False))
def test_any_schedule_gives_the_latents_of_one_device(fleet: Any, drawn: list[Any], order: Any) -> None:
    """Several requests grow, shrink and move at once; every member of the last group ends with the same latents."""
    lives = [Life(slot, request) for slot, request in enumerate(drawn)]
    operations: Operations = {device: [] for device in DEVICES}
    for life in lives:
        operations[life.holders[0]].append(life.encode())
    while running := [life for life in lives if life.chunks]:
        life = order.choice(running)
        life.denoise(*life.chunks.pop(0), operations)
    fleet.run(operations)
    for life in lives:
        expected = alone(fleet, life)
        for device in life.holders:
            state = fleet.state(device, life.slot, **life.shape)
            for name, ours, theirs in zip(("text", "pooled", "latents"), state, expected, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE, err_msg=f"{name} on {device}")


def alone(fleet: Any, life: Life) -> tuple[np.ndarray, ...]:
    """The same request at degree 1 on device 0, from the prompt on."""
    twin = Life(ALONE_SLOT, {"chunks": [], "num_heads": life.num_heads, "encoder": 0, **life.shape})
    twin.state_id = life.state_id
    operations: Operations = {0: [twin.encode()]}
    twin.denoise([0], life.step_index, [0.0], operations)
    fleet.run(operations)
    state: tuple[np.ndarray, ...] = fleet.state(0, ALONE_SLOT, **life.shape)
    return state


def test_pull_copies_the_state_and_its_version(fleet: Any) -> None:
    shape, state = {"num_text": 7, "num_image": 60}, {"slot": 1, "state_id": 9_000_001}
    fleet.send(2, {"op": "pull", "source": 3, "step_index": 0, **state, **shape})
    assert not fleet.has_answered(2, 0.05), "it must wait for the source"
    fleet.run({3: [{"op": "encode", **state, **shape}]})
    fleet.results(2)
    for ours, theirs in zip(fleet.state(2, 1, **shape), fleet.state(3, 1, **shape), strict=True):
        assert np.array_equal(ours, theirs) and ours.any()
    assert fleet.run({0: [{"op": "wait_version", "device": 2, "step_index": 0, **state}]}) == {0: [[9_000_001, 1]]}


def test_pull_refuses_a_state_that_is_too_far(fleet: Any) -> None:
    fleet.run({3: [{"op": "set_version", "slot": 1, "state_id": 9_000_002, "step_index": 5}]})
    fleet.send(2, {"op": "pull", "source": 3, "slot": 1, "state_id": 9_000_002, "step_index": 4} | TEN_TOKENS)
    assert "RuntimeError: slot 1 on device 3" in fleet.receive(2)["error"]


def test_aborted_chunk_leaves_no_readable_state(fleet: Any) -> None:
    """A member is lost after entry: the other is freed, and what its slot holds is not taken for a state."""
    life = Life(2, {"chunks": [], "num_heads": 6, "encoder": 0, **TEN_TOKENS})
    fleet.run({0: [life.encode()]})
    operations: Operations = {device: [] for device in DEVICES}
    life.denoise([0, 1], 1, [0.0] * 4, operations)
    life.denoise([1, 0], 2, [0.0] * 4, operations)
    fleet.send(0, *operations[0])
    fleet.send(1, operations[1][0], {"op": "barrier", "members": [1, 0]})
    fleet.results(1)
    assert not fleet.has_answered(0, 0.1)
    fleet.abort.set(0)
    assert "aborted" in fleet.receive(0)
    assert fleet.version(0, life.slot) == INVALID_VERSION != fleet.version(1, life.slot)
    fleet.reset()
    again = Life(2, {"chunks": [], "num_heads": 6, "encoder": 3, **TEN_TOKENS})
    operations = {device: [] for device in DEVICES}
    operations[3].append(again.encode())
    again.denoise([1, 3, 0], 2, [0.0] * 4, operations)
    fleet.run(operations)
    expected = alone(fleet, again)
    for device in (0, 1, 3):
        np.testing.assert_allclose(fleet.state(device, 2, **TEN_TOKENS)[2], expected[2], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("num_streams", [1, 2])
def test_one_device_attends_like_the_formula(spec: ModelSpec, num_streams: int) -> None:
    """Degree 1 against softmax(q kᵀ / √d) v written out, in float64, with RMSNorm and interleaved rotary embedding."""
    layout = slab_layout(spec, num_devices=1, num_slots=1)
    buffers = [memoryview(bytearray(layout.num_bytes))]
    control = memoryview(bytearray(ControlLayout(num_devices=1).num_bytes))
    slabs, barrier = SharedSlabs(layout, 0, buffers), PairwiseBarrier(layout, 0, buffers, control)
    exchange = make_exchange(slabs, barrier, (0,), 5, 20, spec.num_heads, spec.head_dim)
    torch.manual_seed(0)
    qkv, norms = torch.randn(25, 3, 6, 8), 1 + 0.1 * torch.randn(num_streams, 2, 8)
    angles = torch.randn(25, 4).repeat_interleave(2, dim=1)
    parts = qkv.split([5, 20]) if num_streams == 2 else (qkv,)
    streams = [Stream(part.flatten(1), *norm) for part, norm in zip(parts, norms, strict=True)]
    got = exchange.attend(streams, (angles.cos(), angles.sin()))
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
