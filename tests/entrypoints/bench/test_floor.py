"""The floor counts every GEMM and attention of a step, no more, and its process answers."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tetrion.entrypoints.bench.floor import Attention, Floor, Gemm, step_operators
from tetrion.entrypoints.bench.line_process import LineProcess, ProcessFailed

FLUX = {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 19, "num_single_layers": 38}
TINY = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 1, "num_single_layers": 2}


@pytest.mark.parametrize(("px", "tflop"), [(256, 10.3), (512, 21.5), (1024, 74.4), (2048, 418)])
def test_a_step_of_flux_has_the_known_flops(px: int, tflop: float) -> None:
    operators = step_operators(FLUX, 512, (px // 16) ** 2, 1)
    assert sum(operator.flops for operator in operators) / 1e12 == pytest.approx(tflop, rel=0.03)
    assert sum(isinstance(operator, Attention) for operator in operators) == 57


def test_a_group_shares_tokens_and_heads_rounded_up() -> None:
    operators = step_operators(TINY, 10, 21, 3)
    assert set(operators) >= {Gemm(7, 32, 96), Gemm(4, 32, 96), Attention(31, 2, 8), Gemm(11, 160, 32)}
    assert {operator.rows for operator in operators if isinstance(operator, Gemm)} == {7, 4, 11}


def test_as_many_rows_as_outputs() -> None:
    """Activations and weights of one shape are still tensors of their own."""
    floor = Floor(TINY, torch.device("cpu"))
    floor.prepare(8, 32, 1)
    assert floor.run(0.0)


@pytest.fixture
def config_file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    yield path


async def test_its_process_times_one_shape_after_the_other(config_file: Path) -> None:
    floor = await LineProcess.start("tetrion.entrypoints.bench.floor", str(config_file), "cpu")
    try:
        with pytest.raises(ProcessFailed, match="prepare a shape first"):
            await floor.ask({"seconds": 0.01}, 100)
        for degree in (1, 2):
            await floor.ask({"num_text": 8, "num_image": 16, "degree": degree}, 100)
            times = (await floor.ask({"seconds": 0.02}, 100))["ms"]
            assert times and min(times) > 0
    finally:
        await floor.close()
