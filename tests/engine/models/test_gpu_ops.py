"""The GPU's operators (kernels interpreted here) against the plain ones, and each row's independence of the others."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from tetrion.engine.models.gpu_ops import MIN_ROWS, NARROW_ROWS, GpuOps
from tetrion.engine.models.ops import Linear, Ops, ReferenceOps
from tetrion.kernels.reference import Branch

STEPS, STEP = 3, 2


class Sizes(NamedTuple):
    """Rows, C, hidden and narrow channels."""

    num_rows: int
    C: int
    hidden: int
    narrow: int


FLUX_WIDTHS = (3072, 4096, 6144)
TINY = Sizes(150, 96, 288, 16)
SIZES = [
    pytest.param(
        "cpu",
        TINY,
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter"),
        id="tiny",
    ),
    pytest.param("cuda", Sizes(1150, 3072, 12288, 64), marks=pytest.mark.gpu, id="FLUX.1"),
    pytest.param("cuda", Sizes(1150, 1536, 6144, 64), marks=pytest.mark.gpu, id="SD3-medium"),
    pytest.param("cuda", Sizes(1150, 2432, 9728, 64), marks=pytest.mark.gpu, id="SD3.5-large"),
    pytest.param("cuda", Sizes(1150, 3840, 10240, 64), marks=pytest.mark.gpu, id="Z-Image"),
    pytest.param("cuda", Sizes(1150, 3072, 9216, 128), marks=pytest.mark.gpu, id="FLUX.2-klein-4B"),
    pytest.param("cuda", Sizes(1150, 4096, 12288, 128), marks=pytest.mark.gpu, id="FLUX.2-klein-9B"),
    pytest.param("cuda", Sizes(1150, 6144, 18432, 128), marks=pytest.mark.gpu, id="FLUX.2-dev"),
]


class Tensors:
    def __init__(self, device: str, sizes: Sizes, dtype: torch.dtype) -> None:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(dtype)

        self.num_rows, C, hidden, narrow = sizes
        self.square = Linear(random(C, C) / C**0.5, random(C))
        self.up = Linear(random(hidden, C) / C**0.5, random(hidden))
        self.down = Linear(random(C, hidden) / hidden**0.5, random(C))
        self.joined = Linear(random(C, C + hidden) / hidden**0.5, random(C))
        self.gated = Linear(random(2 * hidden, C) / C**0.5)
        self.down_unbiased, self.joined_unbiased = Linear(self.down.weight), Linear(self.joined.weight)
        self.narrow = Linear(random(narrow, C) / C**0.5, random(narrow))
        self.table = random(STEPS, 2, C)
        self.x, self.y, self.hidden = (random(self.num_rows, width) for width in (C, C, hidden))


Apply = Callable[[Ops, Tensors, slice, Tensor, Tensor], Tensor]
OPERATORS: dict[str, Apply] = {
    "linear": lambda ops, t, rows, a, b: ops.linear(t.x[rows], t.square),
    "linear of long sums": lambda ops, t, rows, a, b: ops.linear(t.hidden[rows], t.down),
    "gelu_linear": lambda ops, t, rows, a, b: ops.gelu_linear(t.x[rows], t.up),
    "linear of long sums without a bias": lambda ops, t, rows, a, b: ops.linear(t.hidden[rows], t.down_unbiased),
    "gated_linear": lambda ops, t, rows, a, b: ops.gated_linear(t.x[rows], t.gated),
    "joined_linear without a bias": lambda ops, t, rows, a, b: ops.joined_linear(
        t.x[rows], t.hidden[rows], t.joined_unbiased
    ),
    "joined_linear": lambda ops, t, rows, a, b: ops.joined_linear(t.x[rows], t.hidden[rows], t.joined),
    "narrow_linear": lambda ops, t, rows, a, b: ops.narrow_linear(t.x[rows], t.narrow),
    "silu": lambda ops, t, rows, a, b: ops.silu(t.x[rows]),
    "residual_modulate": lambda ops, t, rows, a, b: torch.cat(
        ops.residual_modulate([Branch(t.x[rows], a, b, b, t.y[rows].clone())])[0], dim=1
    ),
    "residual_rms": lambda ops, t, rows, a, b: torch.cat(
        ops.residual_rms(t.x[rows], a, b, t.y[rows].clone(), epsilon=1e-5), dim=1
    ),
    "gated_rms_sum": lambda ops, t, rows, a, b: ops.gated_rms_sum(t.x[rows], a, t.y[rows].clone(), epsilon=1e-5),
}


@pytest.fixture(autouse=True)
def fresh_numbers() -> Iterator[None]:
    seed = torch.seed()
    print(f"torch.manual_seed({seed})")
    yield


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("device", "sizes"), SIZES)
def test_equals_the_reference_at_the_counters_step(device: str, sizes: Sizes, name: str) -> None:
    tensors = Tensors(device, sizes, torch.float32)
    ops, apply = GpuOps(torch.tensor([STEP], dtype=torch.int32, device=device)), OPERATORS[name]
    result = apply(ops, tensors, slice(None), *tensors.table.unbind(1))
    step = torch.tensor([STEP], dtype=torch.int32)
    expected = apply(ReferenceOps(step), tensors, slice(None), *tensors.table.unbind(1))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("device", "sizes"), SIZES)
def test_a_row_does_not_depend_on_the_others(device: str, sizes: Sizes, name: str) -> None:
    if name.startswith("joined_linear") and device == "cuda" and sizes.C not in FLUX_WIDTHS:
        pytest.skip("only FLUX has such layers")
    tensors = Tensors(device, sizes, torch.float32 if device == "cpu" else torch.bfloat16)
    ops, apply = GpuOps(torch.tensor([STEP], dtype=torch.int32, device=device)), OPERATORS[name]
    vectors = tensors.table.unbind(1)
    whole = apply(ops, tensors, slice(None), *vectors)
    ends = (1, MIN_ROWS, 128, 167, 256, 333, 576, tensors.num_rows)
    for rows in (*(slice(3, 3 + count) for count in ends[:-1]), *(slice(40, end) for end in ends[1:])):
        assert torch.equal(apply(ops, tensors, rows, *vectors), whole[rows]), f"{name} of rows {rows}"


def test_no_tokens_are_no_problem() -> None:
    tensors, step = Tensors("cpu", TINY, torch.float32), torch.zeros(1, dtype=torch.int32)
    for name, apply in OPERATORS.items():
        result = apply(GpuOps(step), tensors, slice(4, 4), *tensors.table.unbind(1))
        assert result.shape[0] == 0, name


@pytest.mark.parametrize("num_rows", [1, NARROW_ROWS, NARROW_ROWS + 1])
def test_narrow_linear_covers_every_row(num_rows: int) -> None:
    tensors, step = Tensors("cpu", TINY, torch.float32), torch.zeros(1, dtype=torch.int32)
    x = torch.randn(num_rows, tensors.x.shape[1])
    result = GpuOps(step).narrow_linear(x, tensors.narrow)
    expected = ReferenceOps(step).narrow_linear(x, tensors.narrow)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
