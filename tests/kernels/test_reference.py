"""The reference operators against diffusers' own, and their row, head and thread exactness."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import AdaLayerNormZeroSingle, RMSNorm
from torch import Tensor

from tetrion.kernels import reference

NUM_HEADS, HEAD_DIM = 12, 32
HIDDEN = NUM_HEADS * HEAD_DIM
ROWS = 1088
THREADS = (1, 2, 3, 4, 5, 7)
SLICES = [(0, 1), (5, 8), (0, 10), (10, 21), (171, 342), (341, 682), (512, 1024), (0, 1000), (0, ROWS)]


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_qk_norm_rope_equals_diffusers() -> None:
    qkv, q_norm, k_norm = torch.randn(50, 3, NUM_HEADS, HEAD_DIM), torch.rand(HEAD_DIM), torch.rand(HEAD_DIM)
    cos, sin = _rope(50)
    q, k, v = reference.qk_norm_rope(qkv, q_norm, k_norm, (cos, sin))
    for ours, theirs, weight in ((q, qkv[:, 0], q_norm), (k, qkv[:, 1], k_norm)):
        norm = RMSNorm(HEAD_DIM, eps=1e-6)
        norm.weight.data = weight
        expected = apply_rotary_emb(norm(theirs)[None], (cos, sin), sequence_dim=1)[0]
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(v, qkv[:, 2])


def test_qk_norm_rope_leaves_its_input_alone() -> None:
    qkv, rope = torch.randn(4, 3, NUM_HEADS, HEAD_DIM), _rope(4)
    before = qkv.clone()
    reference.qk_norm_rope(qkv, torch.rand(HEAD_DIM), torch.rand(HEAD_DIM), rope)
    reference.qk_norm_rope(qkv, None, None, rope)
    assert torch.equal(qkv, before)


def test_qk_norm_rope_leaves_out_what_is_not_given() -> None:
    qkv, norm, (cos, sin) = torch.randn(50, 3, NUM_HEADS, HEAD_DIM), torch.rand(HEAD_DIM), _rope(50)
    for part, given in enumerate(zip(reference.qk_norm_rope(qkv, None, None, None), qkv.unbind(1), strict=True)):
        assert torch.equal(*given), f"part {part}: nothing is to be done"
    q, k, _ = reference.qk_norm_rope(qkv, norm, None, None)
    torch.testing.assert_close(q, F.rms_norm(qkv[:, 0], (HEAD_DIM,), norm, 1e-6))
    assert torch.equal(k, qkv[:, 1]), "only q has a norm"
    q, k, _ = reference.qk_norm_rope(qkv, None, None, (cos, sin))
    for ours, plain in ((q, qkv[:, 0]), (k, qkv[:, 1])):
        torch.testing.assert_close(ours, apply_rotary_emb(plain[None], (cos, sin), sequence_dim=1)[0])
    both = reference.qk_norm_rope(qkv, norm, norm, (cos, sin))[0]
    normed = reference.qk_norm_rope(qkv, norm, norm, None)[0].unsqueeze(1).expand(-1, 3, -1, -1)
    assert torch.equal(reference.qk_norm_rope(normed, None, None, (cos, sin))[0], both)


def test_qk_norm_rope_takes_an_epsilon() -> None:
    qkv, norm = 1e-3 * torch.randn(5, 3, NUM_HEADS, HEAD_DIM), torch.rand(HEAD_DIM)
    for epsilon in (1e-6, 1e-5):
        q, _, _ = reference.qk_norm_rope(qkv, norm, norm, None, epsilon)
        root = (qkv[:, 0].square().mean(-1, keepdim=True) + epsilon).sqrt()
        torch.testing.assert_close(q, qkv[:, 0] / root * norm)


def test_qk_norm_rope_of_no_rows_is_no_rows() -> None:
    norm = torch.rand(HEAD_DIM)
    parts = reference.qk_norm_rope(torch.randn(0, 3, NUM_HEADS, HEAD_DIM), norm, norm, _rope(0))
    assert [part.shape for part in parts] == [(0, NUM_HEADS, HEAD_DIM)] * 3


def test_a_step_of_a_multistep_solver_is_the_loop_written_out() -> None:
    """A table like UniPC's: four rows of state a token, of which new ones are sums over old ones and the velocity."""
    num_rows, channels, num_steps = 4, 6, 5
    tables = torch.randn(num_steps, num_rows, num_rows + 1)
    state, velocities = torch.randn(50, num_rows * channels), torch.randn(num_steps, 50, channels)
    expected = list(state.split(channels, dim=1))
    for table, velocity in zip(tables, velocities, strict=True):
        new = []
        for row in range(num_rows):
            total = table[row, 0] * expected[0]
            for old in range(1, num_rows):
                total = total + table[row, old] * expected[old]
            new.append(total + table[row, num_rows] * velocity)
        expected = new
        state = reference.guided_step(state, [velocity], table, 1.0)
    assert torch.equal(state, torch.cat(expected, dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.5])
def test_guidance_goes_from_the_negative_prompts_velocity_towards_the_prompts(dtype, guidance) -> None:
    state, velocity, negative = torch.randn(50, 8), torch.randn(50, 8).to(dtype), torch.randn(50, 8).to(dtype)
    coefficients = torch.tensor([[1.0, -0.25]])
    result = reference.guided_step(state, [velocity, negative], coefficients, guidance)
    guided = negative.double() + guidance * (velocity.double() - negative.double())
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), state.double() - 0.25 * guided, rtol=1e-6, atol=1e-6)
    if guidance == 0.0:
        assert torch.equal(result, reference.guided_step(state, [negative], coefficients, guidance))


def test_modulate_and_gate_equal_diffusers() -> None:
    norm = AdaLayerNormZeroSingle(HIDDEN)
    x, y, conditioning = torch.randn(40, HIDDEN) * 3 + 1, torch.randn(40, HIDDEN), torch.randn(1, HIDDEN)
    expected, gate = norm(x[None], emb=conditioning)
    shift, scale, _ = norm.linear(F.silu(conditioning))[0].chunk(3)
    torch.testing.assert_close(reference.modulate(x, shift, scale), expected[0], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(reference.gated_residual(x, gate[0], y), x + gate[0] * y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(reference.gelu_tanh, lambda x: F.gelu(x, approximate="tanh")), (reference.silu, F.silu)],
)
def test_activations(ours, theirs) -> None:
    x = torch.cat([torch.randn(1000) * 4, torch.tensor([0.0, -0.0, 1e-30, -1e-30, 100.0, -100.0, 1e4, -1e4])])
    before = x.clone()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(x, before)


def test_attention_is_softmax_of_scaled_scores() -> None:
    q, k, v = (torch.randn(70, 3, HEAD_DIM) for _ in range(3))
    scores = torch.einsum("lhd,mhd->hlm", q, k).div(HEAD_DIM**0.5)
    expected = torch.einsum("hlm,mhd->lhd", scores.softmax(-1), v)
    torch.testing.assert_close(reference.attention(q, k, v), expected, rtol=1e-5, atol=1e-6)


def test_linear_without_rows_or_bias() -> None:
    weight = torch.randn(6, HEAD_DIM)
    assert reference.linear(torch.randn(0, HEAD_DIM), weight).shape == (0, 6)
    x = torch.randn(3, HEAD_DIM)
    torch.testing.assert_close(reference.linear(x, weight), x @ weight.T)


@pytest.mark.parametrize(("num_in", "num_out"), [(32, 384), (384, 1152), (1536, 384), (1920, 384), (384, 32)])
def test_linear_is_row_and_thread_exact(num_in, num_out) -> None:
    x, weight, bias = torch.randn(ROWS, num_in), torch.randn(num_out, num_in), torch.randn(num_out)
    _assert_exact(lambda rows: (reference.linear(x[rows].clone(), weight, bias),))


@pytest.mark.parametrize(
    "name", ["qk_norm_rope", "rope_alone", "modulate", "gated_residual", "guided_step", "gelu_tanh", "silu"]
)
def test_operator_is_row_and_thread_exact(name) -> None:
    x, y, wide = torch.randn(ROWS, HIDDEN), torch.randn(ROWS, HIDDEN), torch.randn(ROWS, 4 * HIDDEN)
    vector, other, norm, (cos, sin) = torch.randn(HIDDEN), torch.randn(HIDDEN), torch.rand(HEAD_DIM), _rope(ROWS)
    qkv, table = wide[:, : 3 * HIDDEN].unflatten(1, (3, NUM_HEADS, HEAD_DIM)), torch.randn(4, 5)
    operators: dict[str, Callable[[slice], tuple[Tensor, ...]]] = {
        "qk_norm_rope": lambda r: reference.qk_norm_rope(qkv[r], norm, norm, (cos[r], sin[r])),
        "rope_alone": lambda r: reference.qk_norm_rope(qkv[r], None, None, (cos[r], sin[r])),
        "guided_step": lambda r: (reference.guided_step(x[r], [y[r, :96], y[r, 96:192]], table, 3.5),),
        "modulate": lambda r: (reference.modulate(x[r], vector, other),),
        "gated_residual": lambda r: (reference.gated_residual(x[r], vector, y[r]),),
        "gelu_tanh": lambda r: (reference.gelu_tanh(wide[r]),),
        "silu": lambda r: (reference.silu(wide[r]),),
    }
    _assert_exact(operators[name])


@pytest.mark.parametrize("num_tokens", [128, 135, 320])
def test_attention_is_head_and_thread_exact(num_tokens) -> None:
    q, k, v = (torch.randn(num_tokens, NUM_HEADS, HEAD_DIM) for _ in range(3))
    whole = reference.attention(q, k, v)
    for num_threads in THREADS:
        torch.set_num_threads(num_threads)
        for num_heads in (12, 6, 5, 4, 3, 2, 1):
            heads = slice(12 - num_heads, 12)
            for part in (lambda x, h=heads: x[:, h], lambda x, h=heads: x[:, h].contiguous()):
                assert torch.equal(reference.attention(part(q), part(k), part(v)), whole[:, heads])


def _assert_exact(operator: Callable[[slice], tuple[Tensor, ...]]) -> None:
    whole = operator(slice(0, ROWS))
    for num_threads in THREADS:
        torch.set_num_threads(num_threads)
        for start, stop in SLICES:
            for part, expected in zip(operator(slice(start, stop)), whole, strict=True):
                assert torch.equal(part, expected[start:stop]), f"rows {start}:{stop}, {num_threads} threads"


def _rope(num_tokens: int) -> tuple[Tensor, Tensor]:
    angles = torch.randn(num_tokens, HEAD_DIM // 2).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()
