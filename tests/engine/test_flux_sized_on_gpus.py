"""Workers with a model of FLUX.1-dev's size and random weights: bit-exact at every degree, and the largest picture.

Apart from test_on_gpus.py, whose workers would still hold memory: two of these just fit on one card of 80 GB.
"""

import numpy as np
import pytest

from tests.engine.latents_bench import LatentsBench, Schedule
from tetrion.engine import Engine, EngineConfig, ImageRequest


@pytest.mark.parametrize(
    "devices",
    [
        pytest.param("cuda:0", marks=pytest.mark.gpu),
        pytest.param("cuda:0,0", marks=pytest.mark.gpu),
        pytest.param("cuda", marks=pytest.mark.multigpu),
    ],
)
def test_latents_do_not_depend_on_the_degree(devices: str) -> None:
    config = EngineConfig(devices=devices, models=("flux1-dev",), load_format="dummy", max_inflight=2)
    bench = LatentsBench(config, num_steps=2)
    try:
        for size in ((256, 256), (512, 768)):
            expected = bench.alone(size)
            assert np.isfinite(expected).all() and expected.std() > 0.1
            for degree in bench.spec.legal_degrees(bench.num_devices)[1:]:
                members = tuple(range(degree))
                together: Schedule = [(members, 2)]
                resized: Schedule = [(members, 1), ((degree - 1,), 1)]
                for schedule in (together, resized):
                    np.testing.assert_array_equal(bench.latents(size, 1, 0, schedule), expected, f"{size} {schedule}")
    finally:
        bench.close()


@pytest.mark.gpu
def test_the_largest_picture_fits_and_is_the_same_again() -> None:
    """It takes far more memory to decode than anything else, and is decoded between others."""
    requests = [ImageRequest(prompt="a", width=side, height=side, num_steps=1, seed=1) for side in (2048, 256, 2048)]
    with Engine(EngineConfig(devices="cuda:0", models=("flux1-dev",), load_format="dummy")) as engine:
        first, small, again = engine.generate(requests)
    assert first.image.shape == (2048, 2048, 3) and small.image.shape == (256, 256, 3)
    assert first.image.std() > 1
    np.testing.assert_array_equal(first.image, again.image)


@pytest.mark.parametrize(
    ("model", "devices"),
    [
        pytest.param("flux1-kontext-dev", "cuda:0", marks=pytest.mark.gpu),
        pytest.param("flux1-dev", "cuda:0", marks=pytest.mark.gpu),
        pytest.param("flux1-kontext-dev", "cuda", marks=pytest.mark.multigpu),
        pytest.param("flux1-dev", "cuda", marks=pytest.mark.multigpu),
    ],
)
def test_what_comes_of_a_picture_does_not_depend_on_the_degree(model: str, devices: str) -> None:
    """As a reference, and to begin with."""
    picture = np.random.default_rng(1).integers(0, 256, (512, 768, 3), np.uint8)
    config = EngineConfig(devices=devices, models=(model,), load_format="dummy", max_inflight=2, profile_cache=False)
    with Engine(config) as engine:
        degrees = engine.spec.legal_degrees(len(engine.devices))
        asked = [
            ImageRequest(
                prompt="a", width=512, height=512, seed=1, num_steps=4, pictures=(picture,), force_degrees=(degree,)
            )
            for degree in (*degrees, 1)
        ]
        first, *others = engine.generate(asked)
        (without,) = engine.generate(ImageRequest(prompt="a", width=512, height=512, seed=1, num_steps=4))
    for other in others:
        np.testing.assert_array_equal(other.image, first.image)
    assert (without.image != first.image).any()
