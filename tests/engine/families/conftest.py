"""Each case's pipeline as diffusers has it, and the same saved and loaded as workers have it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from tests.engine.families.pipelines import CASES, PROMPT, Case
from tests.engine.families.ranks import Ranks
from tetrion.engine.families.registry import family_of, read_model_spec
from tetrion.engine.params import Params
from tetrion.engine.request import ImageRequest


@dataclass(frozen=True)
class Loaded:
    """A case in both forms."""

    case: Case
    theirs: DiffusionPipeline
    ours: Ranks

    @property
    def prompts(self) -> tuple[str, ...]:
        return (PROMPT, self.case.negative)[: self.case.num_branches]

    def params(self, num_steps: int, prompts: Sequence[str] | None = None) -> Params:
        """Of a request for `num_steps`, of which some are skipped where a picture is begun with. `prompts`: a branch
        each; all by default."""
        case, spec = self.case, self.ours.spec
        prompts = self.prompts if prompts is None else prompts
        shape = msgspec.structs.replace(
            spec.shape(case.width, case.height, len(prompts), case.references), text=self._text(prompts),
            pictures=int(case.strength is not None), has_mask=case.has_mask,
        )  # fmt: skip
        skipped = 0 if case.strength is None else int(num_steps - num_steps * case.strength)
        return Params(
            model=spec.name, shape=shape, num_steps=num_steps - skipped, skipped_steps=skipped,
            guidance=case.guidance, true_cfg_scale=case.true_cfg_scale, seed=7,
        )  # fmt: skip

    def _text(self, prompts: Sequence[str]) -> tuple[int, ...]:
        """Rows of each prompt, as the engine knows them."""
        case, spec = self.case, self.ours.spec
        asked = (ImageRequest(prompt=prompt, width=case.width, height=case.height, guidance=0.0) for prompt in prompts)
        return tuple(family_of(spec.family).shape(spec, request).text[0] for request in asked)

    def begin(self, params: Params, prompts: Sequence[str] | None = None) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The slot's fields of each branch, and the state before the first step."""
        pictures = [torch.from_numpy(picture) for picture in self.case.inputs]
        beginning = self.ours.model.begin(params, pictures, lambda tensor: tensor)
        texts = self.ours.encode(self.prompts if prompts is None else prompts)
        return [{**fields, **beginning.fields} for fields in texts], beginning.state


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package", params=CASES, ids=str)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    case: Case = request.param
    folder = tmp_path_factory.mktemp("checkpoint")
    pipeline = case.pipeline()
    case.save(pipeline, folder)
    ours = Ranks(read_model_spec(folder), case.num_devices)
    yield Loaded(case, pipeline, ours)
    ours.close()
