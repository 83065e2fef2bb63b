"""Real workers with models whose texts are read by language models: of one length for all (FLUX.2), or of their own."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from typing import NamedTuple

import numpy as np
import pytest
import pytest_asyncio
from diffusers import DiffusionPipeline

from tests.engine.families.pipelines import CASES, NEGATIVE, PROMPT, Case
from tetrion.engine.api import AsyncEngine
from tetrion.engine.config import EngineConfig
from tetrion.engine.request import ImageRequest, ImageResult

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.usefixtures("fork_server")]
GUIDED, SHORT, KEEPING, CAUSAL = "z-image", "flux2-klein", "qwen-image", "qwen-image-2.1"
REFERRING, BEGINNING, GROUPED = "flux2-klein-references", "z-image-strength", "krea-2"
NAMES = (GUIDED, SHORT, KEEPING, CAUSAL, REFERRING, BEGINNING, GROUPED)
NUM_STEPS, SEED = 4, 7
DEGREES = ((1,), (2,), (1, 2, 2, 1))
PROMPTS = ("a", NEGATIVE, PROMPT, "a red circle " * 20)


class Served(NamedTuple):
    engine: AsyncEngine
    cases: dict[str, Case]
    pipelines: dict[str, DiffusionPipeline]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def served(fork_server: None, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    cases = {case.name: case for case in CASES if case.name in NAMES}
    folders, pipelines = {}, {}
    for name, case in cases.items():
        folders[name], pipelines[name] = tmp_path_factory.mktemp("checkpoint") / name, case.pipeline()
        case.save(pipelines[name], folders[name])
    config = EngineConfig(models=tuple(map(str, folders.values())), devices="cpu:2", num_threads=1)
    async with AsyncEngine(config) as engine:
        yield Served(engine, cases, pipelines)


async def draw(served: Served, model: str, **fields: object) -> ImageResult:
    case = served.cases[model]
    defaults: dict[str, object] = {
        "model": model, "prompt": PROMPT, "width": case.width, "height": case.height, "num_steps": NUM_STEPS,
        "seed": SEED, "guidance": case.guidance,
    }  # fmt: skip
    return await served.engine.generate(ImageRequest(**(defaults | fields)))  # type: ignore[arg-type]


def digest(result: ImageResult) -> str:
    return hashlib.sha256(result.image.tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("model", "negative"),
    [
        (GUIDED, NEGATIVE),
        (SHORT, None),
        (KEEPING, NEGATIVE),
        (CAUSAL, None),
        (REFERRING, None),
        (BEGINNING, NEGATIVE),
        (GROUPED, NEGATIVE),
    ],
)
async def test_pictures_are_diffusers_at_every_degree(served: Served, model: str, negative: str | None) -> None:
    case = served.cases[model]
    expected = case.draw(served.pipelines[model], NUM_STEPS, SEED).picture.astype(int)
    for degrees in DEGREES:
        result = await draw(
            served,
            model,
            negative_prompt=negative,
            pictures=case.pictures,
            strength=case.strength,
            force_degrees=degrees if case.strength is None else degrees[:-1] or degrees,
        )
        assert np.abs(result.image.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("model", [GUIDED, SHORT, KEEPING, CAUSAL, GROUPED])
async def test_prompts_of_any_length_side_by_side_are_as_alone(served: Served, model: str) -> None:
    alone = [await draw(served, model, prompt=prompt, force_degrees=(1,)) for prompt in PROMPTS]
    assert len({digest(result) for result in alone}) == len(PROMPTS)
    assert [result.num_text_tokens for result in alone] == sorted(result.num_text_tokens for result in alone)
    together = await asyncio.gather(
        *(draw(served, model, prompt=p, force_degrees=degrees) for p in PROMPTS for degrees in DEGREES)
    )
    assert [digest(result) for result in together] == [digest(result) for result in alone for _ in DEGREES]
