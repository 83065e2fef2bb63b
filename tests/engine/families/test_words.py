from pathlib import Path

import pytest

from tests.engine.specs import make_spec
from tetrion.engine.families.locate import resolve_model
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.families.words import unknown_words
from tetrion.engine.model_spec import ModelSpec


@pytest.fixture(params=["shapes", "shapes-sd3"])
def spec(request: pytest.FixtureRequest) -> ModelSpec:
    return read_model_spec(resolve_model(request.param), "safetensors")


def test_an_embedded_model_knows_few_words_in_any_case(spec: ModelSpec) -> None:
    assert unknown_words(spec, "A Medium-sized RED circle, left of (a blue star).") == ()
    assert unknown_words(spec, "a dragon, two Dragons; a DRAGON! and x") == ("dragon", "dragons", "x")
    assert unknown_words(spec, "ein grüner Stern ☆ ...") == ("ein", "grüner", "stern", "☆")


def test_of_other_models_nothing_is_said(tmp_path: Path) -> None:
    """Nor of those that ship without weights and tokenizers."""
    for path in ("", str(tmp_path), *(str(resolve_model(name)) for name in ("flux1-dev", "sd3-medium"))):
        assert unknown_words(make_spec(path=path), "zebra") == ()
