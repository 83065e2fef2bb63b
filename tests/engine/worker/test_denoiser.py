"""What recorded steps read is right for every step, size and branch; what is kept is kept for its own request only."""

import gc
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.engine.worker.conftest import Memory, request_params
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.family import Model
from tetrion.engine.parallel.exchange import Exchange
from tetrion.engine.parallel.layout import NUM_BUFFERS
from tetrion.engine.parallel.words import slot_version
from tetrion.engine.params import Params
from tetrion.engine.worker import denoiser as denoiser_module
from tetrion.engine.worker.cpu import CpuBackend
from tetrion.engine.worker.denoiser import TABLE_STEPS, Denoiser, State, table_parts

SLOT, NUM_STEPS = 1, TABLE_STEPS + 9
STATE = State(5, SLOT)


@given(st.integers(0, 200), st.integers(0, 100))
def test_parts_cover_the_chunk_in_order_and_stay_within_one_table(start: int, length: int) -> None:
    parts = list(table_parts(range(start, start + length)))
    assert [step for part in parts for step in part] == list(range(start, start + length))
    assert all(part[0] // TABLE_STEPS == part[-1] // TABLE_STEPS for part in parts)


class Loaded(NamedTuple):
    model: Model
    exchange: Exchange
    denoiser: Denoiser

    def fill(self, params: Params, seed: int = 0) -> None:
        """A request in SLOT, before its first step."""
        generator = torch.Generator().manual_seed(seed)
        for branch in range(params.shape.num_branches):
            for tensor in self.fields(branch).values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))

    def fields(self, branch: int) -> dict[str, Tensor]:
        """Of the request in SLOT before its first step."""
        state = self.exchange.state(SLOT, 0)
        return {**self.exchange.constants(SLOT, branch), self.model.spec.latents.name: state}

    def run(self, params: Params, *chunks: range, state: State = STATE) -> Tensor:
        """The state after these chunks of a request that is in SLOT."""
        for chunk_index, steps in enumerate(chunks):
            versions = slot_version(state.state_id, steps.start), slot_version(state.state_id, steps.stop)
            if steps.start == 0:
                self.exchange.publish(SLOT, 0, versions[0])
            chunk = self.denoiser.chunk(params.shape, (0,), SLOT, chunk_index, 0, versions)
            self.denoiser.make_room(chunk)
            self.exchange.bind(chunk)
            self.denoiser.prepare(chunk, state, params, steps.start)
            self.exchange.pull_state()
            self.exchange.enter()
            self.denoiser.run(chunk, state, params, steps)
            self.exchange.finish()
        return self.exchange.state(SLOT, len(chunks) % NUM_BUFFERS)[: params.shape.image].clone()

    def fresh(self, params: Params, *chunks: range, seed: int = 0, state_id: int = 5) -> Tensor:
        self.fill(params, seed)
        return self.run(params, *chunks, state=State(state_id, SLOT))


def load(spec: ModelSpec) -> Loaded:
    backend = CpuBackend(Memory(spec, 1).spec(0))
    (model,) = backend.load(publish=True)
    exchange = backend.exchange(model.spec)
    return Loaded(model, exchange, backend.denoiser(model, exchange))


@pytest.fixture
def loaded(tiny_model: ModelSpec, one_thread: None) -> Iterator[Loaded]:
    with torch.no_grad():
        yield load(tiny_model)


def tables_of(denoiser: Denoiser, params: Params, steps: range, state: State = STATE) -> None:
    denoiser._load_tables(state, params, tuple(range(params.shape.num_branches)), steps)


@pytest.mark.parametrize(
    "steps", [range(0, 3), range(7, 8), range(TABLE_STEPS, NUM_STEPS), range(NUM_STEPS - 1, NUM_STEPS)]
)
@pytest.mark.parametrize("num_branches", [1, 2])
def test_tables_hold_the_steps_of_a_chunk(loaded: Loaded, steps: range, num_branches: int) -> None:
    params = request_params(loaded.model.spec, NUM_STEPS, num_branches=num_branches)
    loaded.fill(params)
    tables, network = loaded.denoiser.tables, loaded.model.network
    times, coefficients, _ = loaded.model.schedule(NUM_STEPS, params.shape)
    tables.step.fill_(77)
    tables_of(loaded.denoiser, params, steps)
    assert tables.step.item() == 0
    assert torch.equal(tables.coefficients[: len(steps)], coefficients[steps.start : steps.stop])
    assert (tables.guidance == loaded.model.guidance_factor(params)).all()
    for branch in range(num_branches):
        fields = loaded.fields(branch)
        for row, i in enumerate(steps):
            expected = network.vectors(fields, times[i : i + 1], params)[0]
            assert torch.equal(tables.vectors(branch)[row], expected), f"branch {branch}, step {i}"


@pytest.mark.parametrize("num_branches", [1, 2])
def test_a_long_request_is_the_same_in_any_chunks(loaded: Loaded, num_branches: int) -> None:
    """More steps than the tables have rows, in chunks that end within, at and beyond the tables' end."""
    params = request_params(loaded.model.spec, NUM_STEPS, num_branches=num_branches)
    whole = loaded.fresh(params, range(NUM_STEPS))
    for cut in (1, TABLE_STEPS - 1, TABLE_STEPS, TABLE_STEPS + 1):
        in_parts = loaded.fresh(params, range(cut), range(cut, NUM_STEPS))
        assert torch.equal(in_parts, whole), f"cut after {cut} steps"


def test_steps_are_those_of_the_network_and_the_schedule_written_out(loaded: Loaded) -> None:
    params = request_params(loaded.model.spec, 3, num_branches=2)
    loaded.fill(params)
    network, shape = loaded.model.network, params.shape
    times, coefficients, _ = loaded.model.schedule(3, shape)
    fields = [{n: t.clone() for n, t in loaded.fields(b).items()} for b in range(2)]
    vectors = [network.vectors(fields[b], times, params) for b in range(2)]
    found = loaded.run(params, range(3))
    chunk = loaded.denoiser.chunk(shape, (0,), SLOT, 0, 0, (0, 0))
    loaded.exchange.bind(chunk)
    group, state = loaded.exchange.group(chunk.plans[0].shape_of(0)), fields[0]["latents"][: shape.image]
    for step in range(3):
        loaded.denoiser.tables.step.fill_(step)
        velocities = []
        for branch in range(2):
            group.load_rope(network.rope(shape, branch))
            constants = {name: c.tensor for name, c in network.constants(fields[branch], shape, branch).items()}
            velocities.append(network.step(state, constants, vectors[branch], group.attend))
        guided = velocities[1] + params.true_cfg_scale * (velocities[0] - velocities[1])
        state = state + coefficients[step, 0, 1] * guided
    assert torch.equal(found, state)


def test_another_attempt_at_the_slot_gets_its_own_tables(loaded: Loaded) -> None:
    params = request_params(loaded.model.spec, NUM_STEPS)
    loaded.fill(params)
    vectors = loaded.denoiser.tables.vectors(0)
    tables_of(loaded.denoiser, params, range(1))
    first = vectors[0].clone()
    loaded.fill(params, seed=1)
    tables_of(loaded.denoiser, params, range(1))
    assert torch.equal(vectors[0], first), "the same state: nothing is computed again"
    tables_of(loaded.denoiser, params, range(1), State(6, SLOT))
    assert not torch.equal(vectors[0], first)


def test_sizes_of_equally_many_rows_have_a_recording_in_common_but_not_their_positions(
    tiny_model: ModelSpec, loaded: Loaded
) -> None:
    """20×8 and 8×20 pixels, with one text and with two, in turn: passes of both branches share the group."""
    orders = [
        request_params(tiny_model, 2, size=size, num_branches=num_branches)
        for size, num_branches in (((20, 8), 2), ((8, 20), 1), ((20, 8), 2), ((8, 20), 2), ((8, 20), 1), ((20, 8), 1))
    ]
    for state_id, params in enumerate(orders, start=10):
        with torch.no_grad():
            expected = load(tiny_model).fresh(params, range(2))
        assert torch.equal(loaded.fresh(params, range(2), state_id=state_id), expected), params.shape
    assert len(loaded.denoiser._passes) == 2


def test_a_group_is_given_its_positions_whichever_pass_over_it_comes_next(
    loaded: Loaded, tiny_model: ModelSpec
) -> None:
    """A device that has branch 1 of a group apart uses the group of which a single branch is branch 0."""
    wide, high = (tiny_model.shape(*size, 2) for size in ((20, 8), (8, 20)))
    network, chunk = loaded.model.network, loaded.denoiser.chunk(wide, (0,), SLOT, 0, 0, (0, 0))
    loaded.denoiser.make_room(chunk)
    first, second = loaded.denoiser._passes.values()
    group, given = loaded.exchange.group(chunk.plans[0].shape_of(0)), []
    group.load_rope = given.append  # type: ignore[method-assign]
    for recorded, shape, branch in ((second, wide, 1), (first, high, 0), (second, wide, 1), (first, wide, 0)):
        constants = network.constants(loaded.exchange.constants(SLOT, branch), shape, branch)
        recorded.load(shape, constants, chunk.plans[branch].shard_of(0))
        expected = network.rope(shape, branch)
        assert expected is not None and torch.equal(given[-1][0], expected[0])
    assert given[0] is given[2] is given[3], "what is loaded already is known by being the same"


def test_the_least_recently_used_recordings_go_with_their_rows(
    loaded: Loaded, tiny_model: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denoiser_module, "MAX_RECORDED", 2)
    sizes = [(8, 8), (12, 8), (16, 8), (20, 8)]
    first = [
        loaded.fresh(request_params(tiny_model, 1, size=size), range(1), state_id=id)
        for id, size in enumerate(sizes, start=20)
    ]
    denoiser = loaded.denoiser
    gc.collect()  # without a graph a recording is the pass's own method
    assert len(denoiser._passes) == len(denoiser._tails) == len(denoiser._rows) == 2
    again = [
        loaded.fresh(request_params(tiny_model, 1, size=size), range(1), state_id=id)
        for id, size in enumerate(sizes, start=30)
    ]
    assert all(map(torch.equal, first, again))
