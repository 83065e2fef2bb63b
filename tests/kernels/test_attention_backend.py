"""The choice of attention is the operator's, or depends on head dim and dtype; whatever is chosen is attention."""

import inspect

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.tolerance import assert_close
from tetrion.kernels import reference
from tetrion.kernels.attention_backend import CUDNN_HEAD_DIMS, attend, backend_for


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("num_tokens", [70, 256])
def test_it_is_attention(device, dtype, num_tokens, head_dim) -> None:
    qkv = [torch.randn(num_tokens, 3, head_dim).to(dtype) for _ in range(3)]
    out = attend(*qkv)
    assert out.stride(2) == 1
    assert_close(out, reference.attention(*(x.float() for x in qkv)))


@pytest.mark.parametrize("num_tokens", [96, 1500])
def test_bits_do_not_depend_on_the_number_of_heads(device, num_tokens) -> None:
    tokens = num_tokens if device.type == "cuda" else 96
    q, k, v = (torch.randn(tokens, 6, 64).to(torch.bfloat16) for _ in range(3))
    whole = attend(q, k, v)
    for heads in (slice(0, 1), slice(1, 3), slice(3, 6)):
        assert torch.equal(attend(*(x[:, heads].contiguous() for x in (q, k, v))), whole[:, heads])


def test_bits_of_heads_that_share_keys_do_not_depend_on_their_number(device) -> None:
    q, k, v = (torch.randn(96, heads, 64).to(torch.bfloat16) for heads in (6, 3, 3))
    whole = attend(q, k, v)
    assert_close(whole, reference.attention(*(x.float() for x in (q, k, v))))
    for first, last in ((0, 1), (1, 3)):
        part = attend(*(x.contiguous() for x in (q[:, 2 * first : 2 * last], k[:, first:last], v[:, first:last])))
        assert torch.equal(part, whole[:, 2 * first : 2 * last])


def test_any_number_of_rows_and_heads_is_served_by_ours(device, dtype) -> None:
    for num_rows, num_heads, head_dim in ((1, 1, 32), (7, 5, 64), (130, 2, 128)):
        qkv = [torch.randn(num_rows, num_heads, head_dim).to(dtype) for _ in range(3)]
        assert_close(attend(*qkv, "triton"), reference.attention(*(x.float() for x in qkv)))


def test_left_to_itself_the_choice_is_what_was_measured() -> None:
    assert "heads" not in str(inspect.signature(backend_for))
    for dtype in (torch.bfloat16, torch.float16):
        chosen = {dim: backend_for("auto", dim, dtype, "cuda") for dim in (32, 64, 96, 128, 256)}
        assert chosen == {dim: "cudnn" if dim in CUDNN_HEAD_DIMS else "triton" for dim in chosen}


def test_only_ours_takes_fp32_and_runs_off_the_gpu() -> None:
    for dtype, device_type in ((torch.float32, "cuda"), (torch.bfloat16, "cpu")):
        assert backend_for("auto", 64, dtype, device_type) == "triton"
        with pytest.raises(ValueError, match="attention: cudnn needs 16-bit"):
            backend_for("cudnn", 64, dtype, device_type)


def test_the_operator_decides() -> None:
    assert backend_for("triton", 64, torch.bfloat16, "cuda") == "triton"
    assert backend_for("cudnn", 256, torch.bfloat16, "cuda") == "cudnn"
