"""Each case's pipeline as diffusers has it, and the same saved and loaded as workers have it."""

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import pytest
import torch
from diffusers import DiffusionPipeline

from tests.engine.families.pipelines import CASES, PROMPT, Case
from tests.engine.families.ranks import Ranks
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.params import Params
from tetrion.engine.request import ImageRequest
from tetrion.engine.resolve import resolve_request


@dataclass(frozen=True)
class Loaded:
    """A case in both forms."""

    case: Case
    theirs: DiffusionPipeline
    ours: Ranks

    @property
    def prompts(self) -> tuple[str, ...]:
        return (PROMPT, self.case.negative)[: self.case.num_branches]

    def params(self, num_steps: int) -> Params:
        """As the engine settles a request for `prompts`."""
        case, (prompt, *negative) = self.case, self.prompts
        asked = ImageRequest(
            prompt=prompt, negative_prompt=negative[0] if negative else None, width=case.width, height=case.height,
            num_steps=num_steps, guidance=case.guidance, seed=7,
            true_cfg_scale=case.true_cfg_scale if case.true_cfg_scale > 1 else None,
        )  # fmt: skip
        return resolve_request(asked, self.ours.spec, case.num_devices).params

    def params_of_last(self, num_steps: int) -> Params:
        """For the last of `prompts` alone."""
        params = self.params(num_steps)
        shape = msgspec.structs.replace(params.shape, text=params.shape.text[-1:])
        return msgspec.structs.replace(params, shape=shape)


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
