"""x + gate · y, normed and modulated, against the fp32 reference; in place, strided, row-exact, vectors from tables."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.tolerance import assert_close, poisoned
from tetrion.kernels import reference
from tetrion.kernels.reference import Branch
from tetrion.kernels.residual_modulate import residual_modulate


def branch(num_rows: int, width: int, dtype: torch.dtype, *, adds: bool = True) -> Branch:
    x, y = (torch.randn(num_rows, width).mul(2).add(1).to(dtype) for _ in range(2))
    shift, scale, gate = torch.randn(3, width).to(dtype)
    return Branch(x, shift, scale, gate, y) if adds else Branch(x, shift, scale)


def copy_of(b: Branch) -> Branch:
    return b if b.y is None else b._replace(y=b.y.clone())


def rows_of(b: Branch, rows: slice) -> Branch:
    return copy_of(b._replace(x=b.x[rows], y=None if b.y is None else b.y[rows]))


def check(results: list[tuple[Tensor, Tensor]], branches: list[Branch]) -> None:
    """The sum against fp32's; what is normed against fp32's of that very sum, which was rounded before."""
    for (total, normed), b in zip(results, branches, strict=True):
        x, shift, scale = (tensor.float() for tensor in (b.x, b.shift, b.scale))
        if b.gate is not None and b.y is not None:
            assert_close(total, reference.gated_residual(x, b.gate.float(), b.y.float()))
        assert_close(normed, reference.modulate(total.float(), shift, scale))


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize(("rows", "width"), [((1,), 32), ((7, 5), 384), ((2, 3), 1536), ((3, 2), 2432), ((2, 3), 3072)])
def test_residual_modulate(device, dtype, rows, width, adds) -> None:
    branches = [branch(n, width, dtype, adds=adds) for n in rows]
    given = [copy_of(b) for b in branches]
    results = residual_modulate(given)
    check(results, branches)
    for (total, _), b in zip(results, given, strict=True):
        assert total is (b.y if adds else b.x)


@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_rms_norm_in_place_of_layer_norm(device, dtype, epsilon) -> None:
    b = branch(5, 384, dtype)
    ((total, normed),) = residual_modulate([copy_of(b)], rms_epsilon=epsilon)
    given = total.float()
    factor = (given.square().mean(dim=1, keepdim=True) + epsilon).rsqrt()
    assert_close(normed, given * factor * (1 + b.scale.float()) + b.shift.float())
    ((_, same),) = reference.residual_modulate([Branch(given, b.shift.float(), b.scale.float())], rms_epsilon=epsilon)
    assert_close(normed, same)
    ((_, one),) = residual_modulate([rows_of(b, slice(4, 5))], rms_epsilon=epsilon)
    assert torch.equal(one, normed[4:])


def test_rows_are_exact_whatever_else_is_in_the_call(device, dtype) -> None:
    text, image = branch(9, 96, dtype), branch(20, 96, dtype)
    whole = residual_modulate([copy_of(text), copy_of(image)])
    for first, last in ((slice(0, 1), slice(3, 20)), (slice(2, 9), slice(19, 20)), (slice(4, 4), slice(0, 20))):
        parts = residual_modulate([rows_of(text, first), rows_of(image, last)])
        for (total, normed), (all_total, all_normed), rows in zip(parts, whole, (first, last), strict=True):
            assert torch.equal(total, all_total[rows]) and torch.equal(normed, all_normed[rows])
    ((total, normed),) = residual_modulate([copy_of(image)])
    assert torch.equal(total, whole[1][0]) and torch.equal(normed, whole[1][1])
    nothing = residual_modulate([rows_of(text, slice(0, 0)), rows_of(image, slice(0, 0))])
    assert [len(normed) for _, normed in nothing] == [0, 0]


def test_a_step_counter_picks_the_row_and_strides_are_kept(device, dtype) -> None:
    x, wide = torch.randn(6, 3, 96).to(dtype)[:, 1], poisoned(6, 200, dtype=dtype)
    y, table, step = torch.randn(6, 96).to(dtype), torch.randn(4, 6, 96).to(dtype), torch.zeros(1, dtype=torch.int32)
    for index in (0, 3):
        step.fill_(index)
        wide[:, 40:136] = y
        ((total, normed),) = residual_modulate(
            [Branch(x, table[:, 1], table[:, 4], table[:, 2], wide[:, 40:136])], step=step
        )
        row = table[index]
        ((same, same_normed),) = residual_modulate([Branch(x, row[1], row[4], row[2], y.clone())])
        assert torch.equal(total, same) and torch.equal(normed, same_normed)
    wide[:, 40:136] = float("nan")
    assert wide.isnan().all()


def test_a_table_without_a_step_is_refused(device) -> None:
    x, table = torch.randn(2, 32), torch.randn(4, 32)
    with pytest.raises(AssertionError, match="no step"):
        residual_modulate([Branch(x, table, table)])


def test_one_stream_may_be_normed_twice(device, dtype) -> None:
    """As before two attentions: the same x under other vectors, in another call; only the first adds to it."""
    first, (_, shift, scale, _, _) = branch(5, 96, dtype), branch(5, 96, dtype)
    ((total, normed),) = residual_modulate([copy_of(first)])
    before = total.clone()
    ((same, other),) = residual_modulate([Branch(total, shift, scale)])
    assert same is total and torch.equal(total, before)
    check([(total, normed), (total, other)], [first, Branch(before, shift, scale)])
