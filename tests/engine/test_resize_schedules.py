"""Any resize schedule gives degree 1's latents, bit for bit: grow, shrink, permute, move to disjoint members."""

import functools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.latents_bench import LatentsBench, Schedule, schedules
from tetrion.engine.config import EngineConfig

NUM_DEVICES = 4
NUM_STEPS = 5


@pytest.fixture(scope="module")
def bench() -> Iterator[LatentsBench]:
    config = EngineConfig(devices=f"cpu:{NUM_DEVICES}", num_threads=1, max_inflight=4)
    running = LatentsBench(config, NUM_STEPS)
    yield running
    running.close()


@functools.cache
def alone(bench: LatentsBench, size: tuple[int, int]) -> npt.NDArray[np.float32]:
    return bench.alone(size)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_schedule_gives_the_latents_of_degree_1(bench: LatentsBench, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([(128, 128), (144, 128), (128, 208), (192, 176)]))
    slot, first = data.draw(st.integers(0, 3)), data.draw(st.integers(0, NUM_DEVICES - 1))
    expected = alone(bench, size)
    assert np.isfinite(expected).all() and expected.std() > 0
    latents = bench.latents(size, slot, first, data.draw(schedules(bench)))
    np.testing.assert_array_equal(latents, expected)


def test_moving_to_disjoint_members_and_back(bench: LatentsBench) -> None:
    expected = bench.alone((256, 256))
    moves: Schedule = [((0, 1), 1), ((2, 3), 1), ((1, 0), 1), ((3,), 1), ((0, 1, 2), 1)]
    np.testing.assert_array_equal(bench.latents((256, 256), 1, 3, moves), expected)


def test_a_resized_request_equals_diffusers(bench: LatentsBench) -> None:
    """FluxPipeline on the same weights, seed and steps: within 1e-4 of its latents."""
    import torch
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(bench.spec.path, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    (reference,) = pipeline(
        "a ring",
        width=208,
        height=128,
        num_inference_steps=NUM_STEPS,
        max_sequence_length=bench.spec.max_text_tokens,
        generator=torch.Generator("cpu").manual_seed(3),
        output_type="latent",
    ).images
    latents = bench.latents((208, 128), 2, 1, [((1,), 1), ((3, 0, 2), 1), ((2, 1), 1), ((0, 1, 2, 3), 2)])
    np.testing.assert_allclose(latents, reference.numpy(), rtol=0, atol=1e-4)
