"""The GPU's operators (kernels interpreted here) against the plain ones, and each row's independence of the others."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from tetrion.engine.models.gpu_ops import MIN_ROWS, NARROW_ROWS, GpuOps
from tetrion.engine.models.ops import Linear, Ops, ReferenceOps
from tetrion.kernels.reference import Branch

STEPS, STEP = 3, 2
SIZES = {"cpu": (150, 96, 160, 16), "cuda": (1150, 3072, 12288, 64)}
"""Rows, C, hidden and narrow channels: on a GPU FLUX.1's, for which row exactness was measured."""
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


class Tensors:
    def __init__(self, device: str, dtype: torch.dtype) -> None:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(dtype)

        self.num_rows, C, hidden, narrow = SIZES[device]
        self.square = Linear(random(C, C) / C**0.5, random(C))
        self.up = Linear(random(hidden, C) / C**0.5, random(hidden))
        self.joined = Linear(random(C, C + hidden) / hidden**0.5, random(C))
        self.narrow = Linear(random(narrow, C) / C**0.5, random(narrow))
        self.table = random(STEPS, 2, C)
        self.x, self.y, self.hidden = (random(self.num_rows, width) for width in (C, C, hidden))


Apply = Callable[[Ops, Tensors, slice, Tensor, Tensor], Tensor]
OPERATORS: dict[str, Apply] = {
    "linear": lambda ops, t, rows, a, b: ops.linear(t.x[rows], t.square),
    "gelu_linear": lambda ops, t, rows, a, b: ops.gelu_linear(t.x[rows], t.up),
    "joined_linear": lambda ops, t, rows, a, b: ops.joined_linear(t.x[rows], t.hidden[rows], t.joined),
    "narrow_linear": lambda ops, t, rows, a, b: ops.narrow_linear(t.x[rows], t.narrow),
    "silu": lambda ops, t, rows, a, b: ops.silu(t.x[rows]),
    "residual_modulate": lambda ops, t, rows, a, b: torch.cat(
        ops.residual_modulate([Branch(t.x[rows], a, b, b, t.y[rows].clone())])[0], dim=1
    ),
}


@pytest.fixture(autouse=True)
def fresh_numbers() -> Iterator[None]:
    seed = torch.seed()
    print(f"torch.manual_seed({seed})")
    yield


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("device", DEVICES)
def test_equals_the_reference_at_the_counters_step(device: str, name: str) -> None:
    tensors = Tensors(device, torch.float32)
    ops, apply = GpuOps(torch.tensor([STEP], dtype=torch.int32, device=device)), OPERATORS[name]
    result = apply(ops, tensors, slice(None), *tensors.table.unbind(1))
    step = torch.tensor([STEP], dtype=torch.int32)
    expected = apply(ReferenceOps(step), tensors, slice(None), *tensors.table.unbind(1))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_row_does_not_depend_on_the_others(device: str, name: str) -> None:
    tensors = Tensors(device, torch.float32 if device == "cpu" else torch.bfloat16)
    ops, apply = GpuOps(torch.tensor([STEP], dtype=torch.int32, device=device)), OPERATORS[name]
    vectors = tensors.table.unbind(1)
    whole = apply(ops, tensors, slice(None), *vectors)
    for rows in (slice(0, 1), slice(3, MIN_ROWS), slice(40, 40 + MIN_ROWS), slice(50, tensors.num_rows)):
        assert torch.equal(apply(ops, tensors, rows, *vectors), whole[rows]), f"{name} of rows {rows}"


def test_no_tokens_are_no_problem() -> None:
    tensors, step = Tensors("cpu", torch.float32), torch.zeros(1, dtype=torch.int32)
    for name, apply in OPERATORS.items():
        result = apply(GpuOps(step), tensors, slice(4, 4), *tensors.table.unbind(1))
        assert result.shape[0] == 0, name


@pytest.mark.parametrize("num_rows", [1, NARROW_ROWS, NARROW_ROWS + 1])
def test_narrow_linear_covers_every_row(num_rows: int) -> None:
    tensors, step = Tensors("cpu", torch.float32), torch.zeros(1, dtype=torch.int32)
    x = torch.randn(num_rows, tensors.x.shape[1])
    result = GpuOps(step).narrow_linear(x, tensors.narrow)
    expected = ReferenceOps(step).narrow_linear(x, tensors.narrow)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
