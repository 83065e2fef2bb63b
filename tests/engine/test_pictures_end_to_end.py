"""Pictures in, through real workers: what diffusers draws of them, with the same bits at every degree."""

import asyncio
import hashlib
import io
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import pytest_asyncio
import torch
from diffusers import DiffusionPipeline, FluxImg2ImgPipeline, FluxKontextPipeline
from PIL import Image

from tests.engine.families.folders import change, copied
from tests.engine.families.pipelines import NEGATIVE, PROMPT, Fill, Flux, Kontext
from tetrion.engine.api import AsyncEngine
from tetrion.engine.config import EngineConfig
from tetrion.engine.errors import RequestError
from tetrion.engine.families.checkpoint import embedded_folder
from tetrion.engine.request import ImageRequest, ImageResult

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.usefixtures("fork_server")]
KONTEXT = Kontext("kontext", {"guidance_embeds": True}, guidance=2.5, picture=(64, 64))
FILL = Fill("fill", {"guidance_embeds": True}, guidance=30.0, picture=(56, 72), strength=1.0)
SCHEDULES = ((1,), (2,), (4,), (1, 4, 2), (4, 1))
NUM_STEPS, SEED = 6, 7


class Editors:
    """An engine that serves tiny editing models, `shapes`, and `shapes` with references, and the same as diffusers has
    them."""

    def __init__(self, engine: AsyncEngine, theirs: dict[str, DiffusionPipeline]) -> None:
        self.engine, self.theirs = engine, theirs

    async def draw(self, case: Flux, **fields: object) -> ImageResult:
        defaults: dict[str, object] = {
            "prompt": PROMPT, "model": case.name, "width": case.width, "height": case.height, "seed": SEED,
            "num_steps": NUM_STEPS, "guidance": case.guidance, "pictures": case.pictures,
        }  # fmt: skip
        return await self.engine.generate(ImageRequest(**(defaults | fields)))  # type: ignore[arg-type]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def editors(fork_server: None, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Editors]:
    theirs, folders = {}, []
    with torch.no_grad():
        for case in (KONTEXT, FILL):
            theirs[case.name] = case.pipeline()
            folders.append(str(tmp_path_factory.mktemp(case.name) / case.name))
            case.save(theirs[case.name], Path(folders[-1]))
    editor = copied("shapes", tmp_path_factory.mktemp("editor") / "editor")
    change(editor, "preset.json", name="editor", references=1)
    config = EngineConfig(models=(*folders, "shapes", str(editor)), devices="cpu:4", num_threads=1)
    async with AsyncEngine(config) as running:
        yield Editors(running, theirs)


def digest(result: ImageResult) -> str:
    return hashlib.sha256(result.image.tobytes()).hexdigest()


def assert_near(picture: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(picture.astype(int) - expected).max() <= 1


async def test_kontext_edits_as_diffusers_does_at_every_degree(editors: Editors) -> None:
    results = [await editors.draw(KONTEXT, force_degrees=degrees) for degrees in SCHEDULES]
    assert len({digest(result) for result in results}) == 1
    with torch.no_grad():
        assert_near(results[0].image, KONTEXT.draw(editors.theirs["kontext"], NUM_STEPS, SEED).picture)
    without = await editors.draw(KONTEXT, pictures=())
    assert digest(without) != digest(results[0])
    guided = {"negative_prompt": NEGATIVE, "true_cfg_scale": 3.0}
    assert len({digest(await editors.draw(KONTEXT, **guided, force_degrees=d)) for d in SCHEDULES}) == 1


async def test_fill_draws_where_the_mask_says_as_diffusers_does(editors: Editors) -> None:
    results = [await editors.draw(FILL, mask=FILL.mask, force_degrees=degrees) for degrees in SCHEDULES]
    assert len({digest(result) for result in results}) == 1
    with torch.no_grad():
        assert_near(results[0].image, FILL.draw(editors.theirs["fill"], NUM_STEPS, SEED).picture)
    transparent = np.dstack([*FILL.pictures, 255 - FILL.mask])
    assert transparent.shape == (72, 56, 4)
    through = await editors.draw(FILL, pictures=[transparent])
    assert digest(through) == digest(results[0]), "a picture's own transparency is its mask"
    with pytest.raises(RequestError, match="mask: model 'fill' takes one"):
        await editors.draw(FILL)
    with pytest.raises(RequestError, match="pictures: model 'fill' fills a picture"):
        await editors.draw(FILL, pictures=())


async def test_shapes_begins_with_a_picture_as_diffusers_does(editors: Editors) -> None:
    """The embedded model, whole: encoders, VAE, the later part of its schedule."""
    case = Flux("shapes", {}, guidance=0.0, picture=(144, 128), width=144, height=128)
    pipeline = FluxImg2ImgPipeline.from_pretrained(embedded_folder() / "shapes", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        (theirs,) = pipeline(
            prompt=PROMPT, image=case.image, strength=0.5, width=144, height=128, num_inference_steps=8,
            guidance_scale=0.0, generator=torch.Generator().manual_seed(SEED), max_sequence_length=64,
            output_type="np", return_dict=False,
        )  # fmt: skip
    fields = {"num_steps": 8, "strength": 0.5}
    results = [await editors.draw(case, **fields, force_degrees=degrees) for degrees in SCHEDULES]
    assert len({digest(result) for result in results}) == 1 and len(results[0].degrees) == 4
    assert_near(results[0].image, (theirs[0] * 255).round().astype(np.uint8))
    unlike = [await editors.draw(case, num_steps=8, strength=strength) for strength in (0.3, 1.0)]
    near, far = (np.abs(result.image.astype(int) - case.pictures[0]).mean() for result in unlike)
    assert near < far, "the less strength, the more is left of the picture"


async def test_shapes_with_references_attends_to_a_picture_or_begins_with_it(editors: Editors) -> None:
    """As FluxKontextPipeline has it, but with a strength as FluxImg2ImgPipeline has it."""
    case = Kontext("editor", {}, guidance=0.0, picture=(256, 256), width=256, height=256)
    pipeline = FluxKontextPipeline.from_pretrained(embedded_folder() / "shapes", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        (theirs,) = pipeline(
            prompt=PROMPT, image=case.image, width=256, height=256, num_inference_steps=4, guidance_scale=0.0,
            generator=torch.Generator().manual_seed(SEED), max_sequence_length=64, max_area=256 * 256,
            _auto_resize=False, output_type="np", return_dict=False,
        )  # fmt: skip
    results = [await editors.draw(case, num_steps=4, force_degrees=degrees) for degrees in ((1,), (4, 1, 2))]
    assert len({digest(result) for result in results}) == 1
    assert_near(results[0].image, (theirs[0] * 255).round().astype(np.uint8))
    without = [await editors.draw(case, model=model, num_steps=4, pictures=()) for model in ("editor", "shapes")]
    begun = [await editors.draw(case, model=model, num_steps=4, strength=0.5) for model in ("editor", "shapes")]
    digests = [[digest(result) for result in pair] for pair in (without, begun)]
    assert digests[0][0] == digests[0][1] and digests[1][0] == digests[1][1]
    assert len({digest(results[0]), digests[0][0], digests[1][0]}) == 3


async def test_a_picture_is_the_same_in_whatever_form_it_comes(editors: Editors, tmp_path: Path) -> None:
    expected = digest(await editors.draw(KONTEXT))
    file = io.BytesIO()
    KONTEXT.image.save(file, "PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    for form in (KONTEXT.image, file.getvalue(), tmp_path / "a.png", str(tmp_path / "a.png")):
        assert digest(await editors.draw(KONTEXT, pictures=[form])) == expected


async def test_without_a_size_the_result_has_the_picture_s(editors: Editors) -> None:
    tall = Image.new("RGB", (300, 600), "navy")
    for model, size, strength in (("kontext", (40, 80), None), ("shapes", (256, 512), 1.0)):
        asked = ImageRequest(prompt=PROMPT, model=model, pictures=(tall,), strength=strength, num_steps=2, seed=1)
        result = await editors.engine.generate(asked)
        assert (result.width, result.height) == size == result.image.shape[1::-1]


async def test_many_at_once_share_the_slots(editors: Editors) -> None:
    """More than there are input slots, each with a picture of its own."""
    pictures = [np.roll(KONTEXT.pictures[0], shift, axis=1) for shift in range(0, 56, 7)]
    alone = [digest(await editors.draw(KONTEXT, pictures=[picture], num_steps=2)) for picture in pictures]
    together = await asyncio.gather(*(editors.draw(KONTEXT, pictures=[picture], num_steps=2) for picture in pictures))
    assert [digest(result) for result in together] == alone and len(set(alone)) == len(pictures)
    assert editors.engine._loop is not None and editors.engine._loop.table.input_bytes == 0


async def test_a_request_whose_only_holder_dies_is_encoded_again_with_its_picture(editors: Editors) -> None:
    """Last, since a worker dies."""
    expected = digest(await editors.draw(KONTEXT, num_steps=80, force_degrees=(1,)))
    asked = ImageRequest(
        prompt=PROMPT, model="kontext", width=56, height=72, seed=SEED, num_steps=80, guidance=KONTEXT.guidance,
        pictures=KONTEXT.pictures, force_degrees=(1,),
    )  # fmt: skip
    handle = editors.engine.submit(asked)
    async for progress in handle:
        if progress.step_index:
            break
    assert editors.engine._loop is not None
    request = editors.engine._loop.table.get(handle.request_id)
    assert request is not None and len(request.planned_holders) == 1
    os.kill(editors.engine.worker_pids()[request.planned_holders[0]], signal.SIGKILL)
    result = await handle.result()
    assert digest(result) == expected
    assert editors.engine.stats().recovery.num_deaths == 1
    assert msgspec.structs.asdict(editors.engine.stats().recovery)["num_retries"] >= 1
