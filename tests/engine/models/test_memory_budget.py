"""What a model takes, and its refusal with the numbers."""

import msgspec
import pytest

from tetrion.engine.families.locate import resolve_model
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.memory_budget import TILED_PIXELS, MemoryBudget, memory_budget
from tetrion.engine.models.registry import all_components, needed_components
from tetrion.engine.parallel.layout import slab_layout
from tetrion.engine.roles import Stages
from tetrion.engine.stages import STAGES


@pytest.fixture(scope="module")
def flux() -> ModelSpec:
    return read_model_spec(resolve_model("flux1-dev"), "dummy")


def budget_of(*specs: ModelSpec, stages: Stages = STAGES) -> MemoryBudget:
    components = needed_components(specs, all_components(specs, "dummy"), stages)
    return memory_budget(specs, components, slab_layout(specs, 4, 64, itemsize=2), stages)


def test_a_device_is_charged_for_its_stages_alone(flux: ModelSpec) -> None:
    encode, denoise, decode = (budget_of(flux, stages=(stage,)) for stage in STAGES)
    whole = budget_of(flux).weights_bytes
    assert denoise.weights_bytes == {"transformer": whole["transformer"]}
    assert {"text_encoder", "text_encoder_2"} < encode.weights_bytes.keys()
    assert encode.weights_bytes["transformer"] < whole["transformer"] / 100, "what projects text"
    assert decode.weights_bytes.keys() == {"vae"} and decode.step_bytes == denoise.decode_bytes == 0
    with pytest.raises(ValueError, match=r"model flux1-dev takes to denoise 2.* with roles .* other devices"):
        denoise.fitted(20_000_000_000, "cuda:1")


def test_flux_in_bf16(flux: ModelSpec) -> None:
    budget = budget_of(flux)
    assert sum(budget.weights_bytes.values()) == pytest.approx(33.7e9, rel=0.01)
    assert budget.weights_bytes["transformer"] == 2 * 11_901_408_320
    assert 1.5e9 < budget.slab_bytes < 1.9e9
    assert 1e9 < budget.step_bytes < 3e9 and 10e9 < budget.decode_bytes < 15e9
    assert budget.fitted(budget.num_bytes, "cuda:0") == budget


def test_large_pictures_are_decoded_in_tiles_where_memory_is_short(flux: ModelSpec) -> None:
    budget = budget_of(flux)
    tiled = budget.fitted(budget.num_bytes - 1, "cuda:0")
    assert budget.whole_pixels == 2048 * 2048 and tiled.whole_pixels == TILED_PIXELS
    assert 3e9 < tiled.decode_bytes < 8e9 and tiled.step_bytes == budget.step_bytes
    assert tiled.fitted(tiled.num_bytes, "cuda:0") == tiled


def test_too_little_memory_is_refused_with_the_numbers(flux: ModelSpec) -> None:
    budget = budget_of(flux)
    numbers = r"devices: cuda:1 has 24.0 GB of memory free, .* takes 4\d.\d GB: weights 33.7 GB \(.*transformer 23.8"
    with pytest.raises(ValueError, match=numbers):
        budget.fitted(24_000_000_000, "cuda:1")


def test_models_that_share_a_device_add_their_weights_but_not_their_working_memory(flux: ModelSpec) -> None:
    other = read_model_spec(resolve_model("sd3-medium"), "dummy")
    both, apart = budget_of(flux, other), (budget_of(flux), budget_of(other))
    assert both.model == "flux1-dev, sd3-medium"
    alone = sum(sum(budget.weights_bytes.values()) for budget in apart)
    assert sum(both.weights_bytes.values()) == alone - apart[1].weights_bytes["vae"], "of one shape, so of one content"
    assert both.weights_bytes["flux1-dev/transformer"] == apart[0].weights_bytes["transformer"]
    for name in ("slab_bytes", "step_bytes", "decode_bytes"):
        assert getattr(both, name) == max(getattr(budget, name) for budget in apart)


def test_what_two_models_have_in_common_is_there_once(flux: ModelSpec) -> None:
    twin = msgspec.structs.replace(flux, name="twin")
    assert budget_of(flux, twin).num_bytes == budget_of(flux).num_bytes
