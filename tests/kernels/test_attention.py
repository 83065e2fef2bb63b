"""Fused attention against the fp32 reference; layouts, tails, log-sum-exp, and bits that ignore the number of heads."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.tolerance import LIMITS, assert_close, poisoned, relative_error
from tetrion.kernels import reference
from tetrion.kernels.attention import attention
from tetrion.kernels.attention_tiles import TILES, Tile, tile_for

LENGTHS = (1, 64, 70, 128, 129, 200, 256)


def _inputs(num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(num_tokens, num_heads, head_dim).to(dtype) for _ in range(3)]


def _expected(*qkv: Tensor) -> Tensor:
    return reference.attention(*(x.float() for x in qkv))


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_attention(device, dtype, num_tokens, head_dim) -> None:
    qkv = _inputs(num_tokens, 2, head_dim, dtype)
    out = poisoned(num_tokens, 2, head_dim, dtype=dtype)
    assert attention(*qkv, out=out) is out
    assert_close(out, _expected(*qkv))


@pytest.mark.parametrize("heads_per_key", [2, 3])
def test_several_heads_may_share_keys_and_values(device, dtype, heads_per_key) -> None:
    """Bits are those of keys and values repeated for each."""
    num_tokens, num_keys = 129, 2
    q = torch.randn(num_tokens, num_keys * heads_per_key, 32).to(dtype)
    k, v = torch.randn(2, num_tokens, num_keys, 32).to(dtype)
    out = attention(q, k, v)
    assert_close(out, _expected(q, k, v))
    assert torch.equal(out, attention(q, *(x.repeat_interleave(heads_per_key, dim=1) for x in (k, v))))


@pytest.mark.parametrize(("num_queries", "num_keys"), [(70, 200), (128, 129), (200, 64), (1, 70)])
def test_queries_may_be_fewer_or_more_than_keys(device, dtype, num_queries, num_keys) -> None:
    q, (k, v) = _inputs(num_queries, 2, 32, dtype)[0], _inputs(num_keys, 2, 32, dtype)[1:]
    log_sum_exp = poisoned(2, num_queries, dtype=torch.float32)
    assert_close(attention(q, k, v, log_sum_exp=log_sum_exp), _expected(q, k, v))
    scores = torch.einsum("lhd,mhd->hlm", q.double(), k.double()) / 32**0.5
    assert relative_error(log_sum_exp, scores.logsumexp(-1)) <= 10 * LIMITS[torch.float32]


def test_result_is_made_when_no_output_is_given(device, dtype) -> None:
    qkv = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in _inputs(40, 3, 32, dtype)]
    out = attention(*qkv)
    assert out.is_contiguous() and out.dtype == dtype
    assert_close(out, _expected(*qkv))


@pytest.mark.parametrize("num_tokens", [64, 70, 200])
def test_log_sum_exp(device, dtype, num_tokens) -> None:
    q, k, v = _inputs(num_tokens, 3, 64, dtype)
    log_sum_exp = poisoned(3, num_tokens, dtype=torch.float32)
    attention(q, k, v, log_sum_exp=log_sum_exp)
    scores = torch.einsum("lhd,mhd->hlm", q.double(), k.double()) / 8
    assert relative_error(log_sum_exp, scores.logsumexp(-1)) <= 10 * LIMITS[torch.float32]


def test_strided_layouts_and_nothing_else_touched(device, dtype) -> None:
    """Inputs: [h, L, D] transposed, one projection's slices, padded rows of NaN. Output: columns of a wider tensor."""
    num_tokens, num_heads, head_dim = 150, 2, 32
    q, k, v = _inputs(num_tokens, num_heads, head_dim, dtype)
    transposed = q.transpose(0, 1).contiguous().transpose(0, 1)
    fused = poisoned(num_tokens + 9, 5, num_heads, head_dim, dtype=dtype)
    fused[:num_tokens, 1], fused[:num_tokens, 3] = k, v
    wide = poisoned(num_tokens + 5, 3, num_heads, head_dim, dtype=dtype)
    attention(transposed, fused[:num_tokens, 1], fused[:num_tokens, 3], out=wide[:num_tokens, 1])
    assert_close(wide[:num_tokens, 1], _expected(q, k, v))
    assert torch.equal(wide[:num_tokens, 1], attention(q, k, v))
    wide[:num_tokens, 1] = float("nan")
    assert wide.isnan().all()


def test_large_scores_do_not_overflow(device) -> None:
    """16-bit only: fp32 has no digits left after scores in the hundreds, in the reference neither."""
    q, k, v = _inputs(90, 2, 64, torch.bfloat16)
    q, k = q * 6, k * 6
    assert (q.float()[:, 0] @ k.float()[:, 0].T / 8).max() > 89, "exp of this would not overflow in fp32"
    assert_close(attention(q, k, v), _expected(q, k, v))


@pytest.mark.parametrize("num_tokens", [96, 300])
def test_bits_do_not_depend_on_the_number_of_heads(device, dtype, num_tokens) -> None:
    q, k, v = _inputs(num_tokens, 6, 64, dtype)
    whole = attention(q, k, v)
    for heads in (slice(0, 1), slice(1, 3), slice(3, 6)):
        assert torch.equal(attention(q[:, heads], k[:, heads], v[:, heads]), whole[:, heads])
        assert torch.equal(attention(*(x[:, heads].contiguous() for x in (q, k, v))), whole[:, heads])


def test_a_tile_can_be_given(device, dtype) -> None:
    qkv = _inputs(150, 2, 32, dtype)
    assert_close(attention(*qkv, tile=Tile(64, 32, 4, 2)), _expected(*qkv))


def test_unaligned_strides_are_refused(device) -> None:
    q = torch.randn(20, 2, 33, dtype=torch.float32)[:, :, :32]
    with pytest.raises(AssertionError, match="not aligned"):
        attention(q, q, q)


def test_tiles() -> None:
    for row in TILES:
        assert tile_for(1, row.head_dim, row.itemsize) in {other.tile for other in TILES}
        assert tile_for(row.max_tokens, row.head_dim, row.itemsize) == row.tile
    assert tile_for(1536, 128, 2) == tile_for(2048, 128, 2) != tile_for(2049, 128, 2)
    with pytest.raises(ValueError, match="head dim 48"):
        tile_for(100, 48, 2)
