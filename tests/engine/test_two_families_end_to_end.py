"""Real workers that draw with models of two families, one with guidance: two evaluations a step at every degree."""

import asyncio
import hashlib
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tetrion.engine.api import AsyncEngine
from tetrion.engine.config import EngineConfig
from tetrion.engine.errors import ModelNotFound, RequestError
from tetrion.engine.families.checkpoint import embedded_folder
from tetrion.engine.request import ImageRequest, ImageResult
from tetrion.engine.shape import parse_cost_key

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.usefixtures("fork_server")]
SCHEDULES = ((1,), (2,), (3,), (4,), (1, 4, 2, 3))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shapes_sd3(fork_server: None) -> AsyncIterator[AsyncEngine]:
    models, aliases = ("shapes-sd3", "shapes"), {"flux": "shapes"}
    config = EngineConfig(models=models, model_aliases=aliases, devices="cpu:4", num_threads=1)
    async with AsyncEngine(config) as running:
        yield running


async def draw(engine: AsyncEngine, **fields: object) -> ImageResult:
    defaults: dict[str, object] = {"prompt": "a red circle", "width": 128, "height": 128, "seed": 5, "num_steps": 5}
    return await engine.generate(ImageRequest(**(defaults | fields)))  # type: ignore[arg-type]


def digest(result: ImageResult) -> str:
    return hashlib.sha256(result.image.tobytes()).hexdigest()


async def test_sd3_draws_the_same_bits_at_every_degree_apart_and_in_turn(shapes_sd3: AsyncEngine) -> None:
    results = [await draw(shapes_sd3, force_degrees=degrees) for degrees in SCHEDULES]
    assert [result.degrees[: len(degrees)] for result, degrees in zip(results, SCHEDULES, strict=True)] == [*SCHEDULES]
    assert len({digest(result) for result in results}) == 1


async def test_a_negative_prompt_changes_sd3_s_picture_and_no_degree_does(shapes_sd3: AsyncEngine) -> None:
    plain = digest(await draw(shapes_sd3))
    kept_away = {digest(await draw(shapes_sd3, negative_prompt="red", force_degrees=d)) for d in SCHEDULES}
    assert len(kept_away) == 1 and plain not in kept_away


async def test_sd3_without_guidance_takes_no_negative_prompt(shapes_sd3: AsyncEngine) -> None:
    unguided = {digest(await draw(shapes_sd3, guidance=1.0, force_degrees=degrees)) for degrees in SCHEDULES[:2]}
    assert len(unguided) == 1
    with pytest.raises(RequestError, match="negative_prompt: takes a guidance above 1"):
        await draw(shapes_sd3, guidance=1.0, negative_prompt="red")
    with pytest.raises(RequestError, match="true_cfg_scale"):
        await draw(shapes_sd3, true_cfg_scale=3.0)


async def test_sd3_draws_what_it_is_asked_for(shapes_sd3: AsyncEngine) -> None:
    """Red pixels in the middle of the thing, none of blue anywhere."""
    image = (await draw(shapes_sd3, prompt="a red circle", width=256, height=256, num_steps=12)).image.astype(int)
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    assert ((red > 180) & (green < 100) & (blue < 100)).mean() > 0.03
    assert ((blue > 150) & (red < 100)).mean() < 0.005


async def test_models_on_one_pool_draw_side_by_side_what_each_draws_alone(
    shapes_sd3: AsyncEngine, engine: AsyncEngine
) -> None:
    """Every request in other slots and groups than alone, beside the other model's."""
    seeds = range(4)
    alone = [digest(await draw(engine, seed=seed)) for seed in seeds]
    sd3_alone = [digest(await draw(shapes_sd3, seed=seed)) for seed in seeds]
    both = await asyncio.gather(
        *(draw(shapes_sd3, model="flux", seed=seed, force_degrees=(1, 2, 4, 3, 1)) for seed in seeds),
        *(draw(shapes_sd3, seed=seed, force_degrees=(4, 1, 3, 2, 1)) for seed in seeds),
    )
    assert [result.model for result in both] == ["shapes"] * 4 + ["shapes-sd3"] * 4
    assert [digest(result) for result in both] == alone + sd3_alone


async def test_each_model_has_its_own_costs_and_limits(shapes_sd3: AsyncEngine) -> None:
    stats = shapes_sd3.stats()
    assert stats.profiles.keys() == {"shapes", "shapes-sd3"} == stats.inexact_degrees.keys()
    measured = list(stats.profiles["shapes-sd3"].classes)[:2]
    assert [parse_cost_key(key).num_branches for key in measured] == [2, 2]
    assert not any(stats.inexact_degrees.values())
    with pytest.raises(ModelNotFound, match=r"served: shapes-sd3, shapes$"):
        await draw(shapes_sd3, model="flux1-dev")
    with pytest.raises(RequestError, match="true_cfg_scale: is no input of model 'shapes-sd3'"):
        await draw(shapes_sd3, true_cfg_scale=3.0)


async def test_weights_that_two_models_have_in_common_are_there_once(
    shapes_sd3: AsyncEngine, engine: AsyncEngine
) -> None:
    """`shapes-sd3` takes its VAE from `shapes`."""
    folder = embedded_folder()
    own_mb = sum(file.stat().st_size for file in (folder / "shapes-sd3").rglob("*.safetensors")) / 1e6
    added_mb = (shapes_sd3.stats().weights_bytes - engine.stats().weights_bytes) / 1e6
    assert 0.97 * 2 * own_mb < added_mb < 1.03 * 2 * own_mb, "half precision on disk, fp32 in memory"


async def test_flux_with_true_guidance_draws_the_same_bits_at_every_degree(engine: AsyncEngine) -> None:
    guided = {"negative_prompt": "blue", "true_cfg_scale": 3.0}
    pictures = {digest(await draw(engine, **guided, force_degrees=degrees)) for degrees in SCHEDULES}
    assert len(pictures) == 1 and digest(await draw(engine)) not in pictures
