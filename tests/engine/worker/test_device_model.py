"""What a recorded step reads is right for every step of a long request, whose tables are made in parts."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")

from tests.engine.worker.conftest import Memory
from tetrion.engine.messages import Denoise
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.device_ops import DeviceOps
from tetrion.engine.models.registry import load_device_pipeline, model_components
from tetrion.engine.parallel.device_exchange import DeviceExchange
from tetrion.engine.parallel.device_memory import DeviceMemory
from tetrion.engine.params import Params
from tetrion.engine.sampling.flow_match import sigmas, timesteps
from tetrion.engine.shape import StepShape
from tetrion.engine.worker.device_model import DeviceModel
from tetrion.engine.worker.step_graphs import TABLE_STEPS, table_parts
from tetrion.engine.worker.work_queue import ImmediateQueue

CPU, SLOT, NUM_STEPS, NUM_IMAGE, GUIDANCE = torch.device("cpu"), 1, TABLE_STEPS + 9, 10, 2.5
SHAPE = StepShape(width=20, height=8, image=NUM_IMAGE, text=(4,))
PARAMS = Params(model="tiny", shape=SHAPE, num_steps=NUM_STEPS, guidance=GUIDANCE, seed=0)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter")


@given(st.integers(0, 200), st.integers(0, 100))
def test_parts_cover_the_chunk_in_order_and_stay_within_one_table(start: int, length: int) -> None:
    parts = list(table_parts(start, start + length))
    assert [step for part in parts for step in part] == list(range(start, start + length))
    assert all(part[0] // TABLE_STEPS == part[-1] // TABLE_STEPS for part in parts)


@pytest.fixture
def model(tiny_model: ModelSpec) -> Iterator[tuple[DeviceModel, torch.Tensor]]:
    """A loaded model, and the pooled embedding in SLOT."""
    spec = Memory(tiny_model, 1).spec(0)
    memory = DeviceMemory(spec.layout, 0, CPU, spec.slab_fds, spec.control_fd)
    exchange = DeviceExchange(memory.slabs, memory.abort, memory.clear_abort, tiny_model.num_heads, tiny_model.head_dim)
    step, components = torch.zeros(1, dtype=torch.int32), model_components(tiny_model, "dummy")
    with torch.no_grad():
        pooled = memory.slabs.slot(0, SLOT).pooled.copy_(torch.randn(tiny_model.pooled_dim))
        pipeline = load_device_pipeline(tiny_model, "dummy", components, CPU, torch.float32, DeviceOps(step))
        yield DeviceModel(pipeline, ImmediateQueue(), memory.slabs, exchange, step), pooled


def denoise(step_index: int, chunk_steps: int, state_id: int = 5) -> Denoise:
    return Denoise(
        command_id=1, round_id=0, request_id="r", state_id=state_id, slot=SLOT, members=(0,), holders=(0,), source=0,
        step_index=step_index, chunk_steps=chunk_steps, params=PARAMS,
    )  # fmt: skip


@pytest.mark.parametrize(
    "steps", [range(0, 3), range(7, 8), range(TABLE_STEPS, NUM_STEPS), range(NUM_STEPS - 1, NUM_STEPS)]
)
def test_tables_hold_the_chunks_steps(model, steps: range) -> None:
    loaded, pooled = model
    scheduler, flux = loaded.pipeline.spec.scheduler, loaded.pipeline.flux
    levels = sigmas(scheduler, NUM_STEPS, NUM_IMAGE)
    loaded.tables.step.fill_(77)
    loaded.load_tables(denoise(steps.start, len(steps)), NUM_IMAGE, steps)
    assert loaded.tables.step.item() == 0
    for row, i in enumerate(steps):
        time = torch.from_numpy(timesteps(scheduler, levels))[i : i + 1]
        assert torch.equal(loaded.tables.modulation[row], flux.modulations(time, GUIDANCE, pooled)[0])
        assert loaded.tables.deltas[row].item() == np.float32(levels[i + 1] - levels[i])


def test_another_attempt_at_the_slot_gets_its_own_tables(model) -> None:
    loaded, pooled = model
    loaded.load_tables(denoise(0, 1), NUM_IMAGE, range(1))
    first = loaded.tables.modulation[0].clone()
    pooled.mul_(-1)
    loaded.load_tables(denoise(0, 1), NUM_IMAGE, range(1))
    assert torch.equal(loaded.tables.modulation[0], first), "the same state: nothing is computed again"
    loaded.load_tables(denoise(0, 1, state_id=6), NUM_IMAGE, range(1))
    assert not torch.equal(loaded.tables.modulation[0], first)
