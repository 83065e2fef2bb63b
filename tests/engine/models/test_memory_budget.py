"""What a model takes, and its refusal with the numbers."""

import pytest

from tetrion.engine.model_spec import ModelSpec, read_model_spec
from tetrion.engine.models.locate import resolve_model
from tetrion.engine.models.memory_budget import memory_budget
from tetrion.engine.models.registry import model_components
from tetrion.engine.parallel.layout import slab_layout


@pytest.fixture(scope="module")
def flux() -> ModelSpec:
    return read_model_spec(resolve_model("flux1-dev"), "dummy")


def test_flux_in_bf16(flux: ModelSpec) -> None:
    budget = memory_budget(flux, model_components(flux, "dummy"), slab_layout(flux, 4, 64, itemsize=2))
    assert sum(budget.weights_bytes.values()) == pytest.approx(33.7e9, rel=0.01)
    assert budget.weights_bytes["transformer"] == 2 * 11_901_408_320
    assert 0.9e9 < budget.slab_bytes < 1.2e9
    assert 1e9 < budget.step_bytes < 3e9 and 3e9 < budget.decode_bytes < 8e9
    budget.check(budget.num_bytes, "cuda:0")


def test_too_little_memory_is_refused_with_the_numbers(flux: ModelSpec) -> None:
    budget = memory_budget(flux, model_components(flux, "dummy"), slab_layout(flux, 4, 64, itemsize=2))
    numbers = r"devices: cuda:1 has 24.0 GB of memory free, .* takes 4\d.\d GB: weights 33.7 GB \(.*transformer 23.8"
    with pytest.raises(ValueError, match=numbers):
        budget.check(24_000_000_000, "cuda:1")
