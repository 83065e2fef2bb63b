"""Real workers with roles: the same bits as without, whoever dies."""

import asyncio
import hashlib
import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tetrion.engine.api import AsyncEngine
from tetrion.engine.config import EngineConfig
from tetrion.engine.errors import RequestError
from tetrion.engine.request import ImageRequest, ImageResult

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.usefixtures("fork_server")]
MODELS, ROLES = ("shapes", "shapes-sd3"), "0:encode,1-2:denoise,3:denoise+decode"
SCHEDULES = ((1,), (2,), (3,), (1, 3, 2))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def parted(fork_server: None) -> AsyncIterator[AsyncEngine]:
    config = EngineConfig(models=MODELS, devices="cpu:4", roles=ROLES, num_threads=1)
    async with AsyncEngine(config) as running:
        yield running


async def draw(engine: AsyncEngine, **fields: object) -> ImageResult:
    defaults: dict[str, object] = {"prompt": "a red circle", "width": 128, "height": 128, "seed": 5, "num_steps": 5}
    return await engine.generate(ImageRequest(**(defaults | fields)))  # type: ignore[arg-type]


def digest(result: ImageResult) -> str:
    return hashlib.sha256(result.image.tobytes()).hexdigest()


async def test_bits_are_those_of_devices_without_roles(parted: AsyncEngine, engine: AsyncEngine) -> None:
    expected = digest(await draw(engine))
    assert {digest(await draw(parted, force_degrees=degrees)) for degrees in SCHEDULES} == {expected}


async def test_a_model_of_another_family_draws_the_same_bits_at_every_degree(parted: AsyncEngine) -> None:
    fields = {"model": "shapes-sd3", "negative_prompt": "green"}
    assert len({digest(await draw(parted, **fields, force_degrees=degrees)) for degrees in SCHEDULES}) == 1


async def test_degrees_are_those_of_the_devices_that_denoise(parted: AsyncEngine) -> None:
    assert parted.stats().roles == ROLES and parted.stats().unserved == ()
    assert all(max(cost.step_ms) == 3 for cost in parted.stats().profiles["shapes"].classes.values())
    with pytest.raises(RequestError, match="force_degrees"):
        await draw(parted, force_degrees=(4,))


@pytest.mark.parametrize("device_id", [0, 1, 3])
async def test_nothing_is_lost_with_a_device_and_bits_stay(
    parted: AsyncEngine, engine: AsyncEngine, device_id: int
) -> None:
    """The only one that encodes, one that denoises, and the only one that decodes."""
    num_steps, num_deaths = 40, parted.stats().recovery.num_deaths
    expected = [digest(await draw(engine, seed=seed, num_steps=num_steps)) for seed in range(3)]
    begun = parted.submit(ImageRequest(prompt="a red circle", width=128, height=128, seed=0, num_steps=num_steps))
    async for update in begun:
        if update.step_index:
            break
    os.kill(parted.worker_pids()[device_id], signal.SIGKILL)
    others = [draw(parted, seed=seed, num_steps=num_steps) for seed in (1, 2)]
    drawn = await asyncio.wait_for(asyncio.gather(begun.result(), *others), timeout=120)
    assert [digest(result) for result in drawn] == expected
    assert parted.stats().recovery.num_deaths == num_deaths + 1
    async with asyncio.timeout(60):
        while len(parted.stats().recovery.serving) < 4:
            await asyncio.sleep(0.01)
