"""The floor runs every GEMM and attention of a step, no more, and its process answers."""

import msgspec
import pytest
import torch

from tetrion.engine.families.locate import resolve_model
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.recording import Attention, Gemm, step_operators
from tetrion.engine.shape import StepShape
from tetrion.entrypoints.bench import floor as floor_module
from tetrion.entrypoints.bench.floor import Floor
from tetrion.entrypoints.bench.line_process import LineProcess, ProcessFailed

SHAPE = StepShape(width=128, height=144, image=72, text=(64,))


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return read_model_spec(resolve_model("shapes"))


def test_it_runs_the_operators_of_a_step_in_order(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Gemm | Attention] = []

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
        assert len(bias) == len(weight)
        found.append(Gemm(len(x), weight.shape[1], len(weight)))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        assert q.shape == k.shape == v.shape
        found.append(Attention(q.shape[2], q.shape[1], q.shape[3]))

    monkeypatch.setattr(floor_module.F, "linear", linear)
    monkeypatch.setattr(floor_module, "_attend", attend)
    floor = Floor(spec, torch.device("cpu"))
    floor.prepare(SHAPE, 3)
    floor.run(0.0)
    assert found == step_operators(spec, SHAPE, 3)


def test_as_many_rows_as_outputs_are_tensors_of_their_own(spec: ModelSpec) -> None:
    """Activations and weights of one shape differ in number."""
    rows = spec.hidden_size
    floor = Floor(spec, torch.device("cpu"))
    floor.prepare(StepShape(width=0, height=0, image=rows, text=(64,)), 1)
    assert floor.run(0.0)


async def test_its_process_times_one_shape_after_the_other(spec: ModelSpec) -> None:
    given = msgspec.json.encode(spec).decode()
    floor = await LineProcess.start("tetrion.entrypoints.bench.floor", given, "cpu")
    try:
        with pytest.raises(ProcessFailed, match="prepare a shape first"):
            await floor.ask({"seconds": 0.01}, 100)
        for degree in (1, 2):
            await floor.ask({"shape": msgspec.to_builtins(SHAPE), "degree": degree}, 100)
            times = (await floor.ask({"seconds": 0.02}, 100))["ms"]
            assert times and min(times) > 0
    finally:
        await floor.close()
