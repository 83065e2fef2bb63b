"""The choice of attention depends on tokens, head dim and dtype; whatever is chosen is attention."""

import inspect

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.tolerance import assert_close
from tetrion.kernels import attention_backend, reference
from tetrion.kernels.attention_backend import TABLE, attend, backend_for


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


def test_the_table_serves_every_length_of_its_head_dims() -> None:
    assert "heads" not in str(inspect.signature(backend_for))
    for row in TABLE:
        for num_tokens in (1, row.max_tokens):
            assert backend_for(num_tokens, row.head_dim, torch.bfloat16, "cuda") in ("cudnn", "triton")


def test_a_longer_sequence_takes_the_next_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (attention_backend.Row(64, 4096, "cudnn"), attention_backend.Row(64, 512, "triton"))
    monkeypatch.setattr(attention_backend, "TABLE", rows)
    chosen = [backend_for(n, 64, torch.float16, "cuda") for n in (1, 512, 513, 4096, 4097)]
    assert chosen == ["triton", "triton", "cudnn", "cudnn", "triton"]


def test_only_ours_takes_fp32_and_runs_off_the_gpu() -> None:
    assert backend_for(512, 64, torch.float32, "cuda") == backend_for(512, 64, torch.bfloat16, "cpu") == "triton"
