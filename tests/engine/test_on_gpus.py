"""Real GPU workers: bit-exact at every degree and schedule, close to the CPU's pictures and to diffusers.

`gpu` needs one card, which two workers share; `multigpu` takes every card of the host.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.latents_bench import LatentsBench, schedules
from tetrion.engine.api import AsyncEngine
from tetrion.engine.config import EngineConfig
from tetrion.engine.request import ImageRequest, ImageResult

ONE_CARD_TWICE = pytest.param("cuda:0,0", marks=pytest.mark.gpu)
EVERY_CARD = pytest.param("cuda", marks=pytest.mark.multigpu)
SIZES = [(128, 128), (144, 128), (256, 208), (512, 512)]
NUM_STEPS = 5
NO_DEADLINE = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=[ONE_CARD_TWICE, EVERY_CARD])
def bench(request: pytest.FixtureRequest) -> Iterator[LatentsBench]:
    running = LatentsBench(EngineConfig(devices=request.param, max_inflight=4), NUM_STEPS)
    yield running
    running.close()


@NO_DEADLINE
@given(st.data())
def test_every_schedule_gives_the_latents_of_degree_1(bench: LatentsBench, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from(SIZES))
    slot, first = data.draw(st.integers(0, 3)), data.draw(st.integers(0, bench.num_devices - 1))
    expected = bench.alone(size)
    assert np.isfinite(expected).all() and expected.std() > 0
    np.testing.assert_array_equal(bench.latents(size, slot, first, data.draw(schedules(bench))), expected)


def test_latents_are_close_to_the_cpus(bench: LatentsBench) -> None:
    on_cpu = LatentsBench(EngineConfig(devices="cpu:1", max_inflight=4), NUM_STEPS)
    try:
        for size in SIZES[:3]:
            expected = on_cpu.alone(size)
            error = np.linalg.norm(bench.alone(size) - expected) / np.linalg.norm(expected)
            assert error < 0.05, f"{size}: relative error {error:.4f} in bf16"
    finally:
        on_cpu.close()


def request(**fields: object) -> ImageRequest:
    defaults: dict[str, object] = {"prompt": "a red circle", "width": 256, "height": 256, "seed": 7, "num_steps": 8}
    return ImageRequest(**(defaults | fields))  # type: ignore[arg-type]


def digest(result: ImageResult) -> str:
    return hashlib.sha256(result.image.tobytes()).hexdigest()


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[ONE_CARD_TWICE, EVERY_CARD])
async def engine(request: pytest.FixtureRequest):
    async with AsyncEngine(EngineConfig(devices=request.param, profile_cache=False)) as running:
        yield running


@pytest.mark.asyncio(loop_scope="module")
async def test_pictures_do_not_depend_on_the_degree(engine: AsyncEngine) -> None:
    assert engine.stats().inexact_degrees == {"shapes": ()}
    schedules: list[tuple[int, ...]] = [(1,), (2,), (1, 2, 1, 2), (2, 2, 1)]
    results = [await engine.generate(request(force_degrees=degrees)) for degrees in schedules]
    assert [result.degrees[0] for result in results] == [1, 2, 1, 2]
    assert len({digest(result) for result in results}) == 1


@pytest.mark.asyncio(loop_scope="module")
async def test_a_crowd_changes_no_picture(engine: AsyncEngine) -> None:
    requests = [request(seed=seed, width=width) for seed, width in enumerate((128, 256, 512, 256, 128, 384))]
    alone = [digest(await engine.generate(one)) for one in requests]
    handles = [engine.submit(one) for one in requests]
    assert [digest(await handle.result()) for handle in handles] == alone


@pytest.mark.asyncio(loop_scope="module")
async def test_pictures_are_close_to_the_cpus(engine: AsyncEngine) -> None:
    async with AsyncEngine(EngineConfig(devices="cpu:1", profile_cache=False)) as on_cpu:
        expected = (await on_cpu.generate(request())).image.astype(int)
    difference = np.abs((await engine.generate(request())).image.astype(int) - expected)
    assert difference.mean() < 4, f"mean difference of {difference.mean():.2f} levels"


@pytest.mark.gpu
@pytest.mark.asyncio(loop_scope="module")
async def test_one_worker_on_one_card() -> None:
    async with AsyncEngine(EngineConfig(devices="cuda:0", profile_cache=False)) as alone:
        first = await alone.generate(request())
        assert first.image.shape == (256, 256, 3) and first.image.std() > 5
        assert digest(await alone.generate(request())) == digest(first)
