"""Families as a GPU worker has them: weights in bf16, the GPU's operators (kernels interpreted here), near to fp32."""

from collections.abc import Callable, Sequence

import msgspec
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

import tests.engine.parallel.quick_interpreter  # noqa: F401
from tests.engine.families.conftest import Loaded
from tetrion.engine.models.family import Network
from tetrion.engine.models.gpu_ops import GpuOps
from tetrion.engine.models.registry import all_components, load_on_device
from tetrion.engine.parallel.exchange import Stream
from tetrion.engine.parallel.group import first_rows
from tetrion.engine.shape import StepShape
from tetrion.kernels.reference import attention, qk_norm_rope

NUM_STEPS, STEP = 4, 2
TOLERANCE = 0.05
NAMES = ("flux1-dev", "sd3.5-medium", "z-image", "flux2-klein", "krea-2-turbo", "qwen-image")
"""One case of each network: the interpreter takes seconds."""
SIZE = (32, 24)
CPU = torch.device("cpu")


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter")
def test_a_prompt_a_step_and_a_picture_in_bf16(loaded: Loaded) -> None:
    if loaded.case.name not in NAMES:
        pytest.skip("another case has the same network")
    ours, params, prompt = loaded.ours, loaded.params(NUM_STEPS, loaded.prompts[-1:]), loaded.prompts[-1]
    spec = ours.spec
    shape = msgspec.structs.replace(spec.shape(*SIZE), text=params.shape.text)
    params = msgspec.structs.replace(params, shape=shape)
    ops, components = GpuOps(torch.tensor([STEP], dtype=torch.int32)), all_components([spec], "safetensors")
    (model,) = load_on_device([spec], "safetensors", components, CPU, torch.bfloat16, ops)
    latents = model.codec.noise(3, shape)
    fields, (expected_fields,) = model.text.embed(model.text.tokens(prompt).ids), ours.encode([prompt])
    assert all(field.dtype == torch.bfloat16 for field in fields.values()) and fields.keys() == expected_fields.keys()
    rows = shape.text[0]
    assert error(fields["text"][:rows], expected_fields["text"][:rows]) < TOLERANCE
    times = model.schedule(NUM_STEPS, shape).times
    vectors = model.network.vectors(fields, times, params)
    constants = {name: constant.tensor for name, constant in model.network.constants(fields, shape, 0).items()}
    velocity = model.network.step(latents.bfloat16(), constants, vectors, attend_of(loaded, model.network, shape))
    covered = spec.sizes.num_covered(shape.width, shape.height)
    expected = ours.velocity(expected_fields, latents, params, STEP)
    assert velocity.dtype == torch.bfloat16 and error(velocity[:covered], expected[:covered]) < TOLERANCE
    picture, expected_picture = (m.codec.decode(latents, shape).pixels.float() for m in (model, ours.model))
    assert (picture - expected_picture).abs().mean() < 255 * TOLERANCE


def attend_of(loaded: Loaded, network: Network, shape: StepShape) -> Callable[[Sequence[Stream]], Tensor]:
    """All rows and heads on one device, in fp32."""
    spec = loaded.ours.spec
    counts, rope = shape.counts(spec.segments), network.rope(shape, 0)
    starts = first_rows(counts)

    def attend(streams: Sequence[Stream]) -> Tensor:
        parts = []
        for stream in streams:
            tables = None
            if stream.has_rope and rope is not None:
                rows = torch.cat([torch.arange(starts[s], starts[s] + counts[s]) for s in stream.segments])
                cos, sin = (table[rows].repeat_interleave(2, dim=1) for table in rope)
                tables = cos, sin
            norms = (None if norm is None else norm.float() for norm in (stream.q_norm, stream.k_norm))
            heads = [spec.num_heads, spec.num_key_heads, spec.num_key_heads]
            qkv = stream.qkv.float().unflatten(1, (sum(heads), spec.head_dim)).split(heads, dim=1)
            parts.append(qk_norm_rope(qkv, *norms, tables, stream.epsilon))
        q, k, v = (torch.cat(part) for part in zip(*parts, strict=True))
        return attention(q, k, v).flatten(1).bfloat16()

    return attend


def error(tensor: Tensor, expected: Tensor) -> float:
    """Relative, over everything."""
    return float((tensor.float() - expected).norm() / expected.norm())
