"""Which models an engine serves, and the names that they answer to."""

import json
import shutil
from pathlib import Path

import pytest

from tetrion.engine.config import EngineConfig
from tetrion.engine.errors import ModelNotFound
from tetrion.engine.families.checkpoint import embedded_folder
from tetrion.engine.families.served import ServedModels, read_served_models
from tetrion.engine.model_spec import CheckpointError
from tetrion.engine.request import ImageRequest
from tetrion.engine.resolve import resolve_request


def served(*models: str, **config: object) -> ServedModels:
    return read_served_models(EngineConfig(models=models, load_format="dummy", **config))  # type: ignore[arg-type]


def model_drawing(models: ServedModels, name: str | None) -> str:
    return resolve_request(ImageRequest(prompt="a star", model=name), models, 2).params.model


def test_requests_get_the_model_that_they_name_or_the_first() -> None:
    models = served("shapes", "flux1-dev", "shapes-sd3")
    assert [*models.specs] == ["shapes", "flux1-dev", "shapes-sd3"]
    assert model_drawing(models, None) == "shapes"
    for name in models.specs:
        assert model_drawing(models, name) == name
    size = resolve_request(ImageRequest(prompt="a", model="flux1-dev"), models, 2).params.shape.size
    assert size == (1024, 1024)
    with pytest.raises(ModelNotFound, match="'SHAPES' is not served here; served: shapes, flux1-dev, shapes-sd3"):
        model_drawing(models, "SHAPES")


def test_a_model_answers_to_what_the_configuration_calls_it_and_to_aliases(tmp_path: Path) -> None:
    folder = tmp_path / "some" / "shapes-copy"
    shutil.copytree(embedded_folder() / "flux1-dev", folder)
    preset = json.loads((folder / "preset.json").read_bytes()) | {"name": "copy"}
    (folder / "preset.json").write_text(json.dumps(preset))
    models = served("shapes", str(folder), model_aliases={"gpt-image-1": "copy", "same": str(folder), "mine": "shapes"})
    for name in ("copy", str(folder), "gpt-image-1", "same"):
        assert model_drawing(models, name) == "copy"
    assert model_drawing(models, "mine") == "shapes"
    assert models.aliases("copy") == (str(folder), "gpt-image-1", "same") and models.aliases("shapes") == ("mine",)


@pytest.mark.parametrize(
    ("models", "config", "says"),
    [
        (("shapes", "shapes"), {}, "models: 'shapes' and '.*' are both called 'shapes'"),
        (("shapes",), {"model_aliases": {"x": "flux1-dev"}}, "model_aliases.x: 'flux1-dev' is not among .*: shapes"),
        (("shapes", "flux1-dev"), {"model_aliases": {"shapes": "flux1-dev"}}, "model_aliases: 'shapes' cannot be"),
        (("shapes",), {"model_aliases": {"": "shapes"}}, "model_aliases: '' cannot be a name"),
        (("shapes",), {"profiles": {"flux1-dev": "p.json"}}, "profiles.flux1-dev: 'flux1-dev' is not among"),
    ],
)
def test_names_that_cannot_be_are_refused(models: tuple[str, ...], config: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        served(*models, **config)


def test_a_model_that_is_not_there_is_refused_whichever_it_is() -> None:
    with pytest.raises(CheckpointError, match="'nowhere' is neither a folder nor an embedded model"):
        served("shapes", "nowhere")


def test_one_text_is_no_sequence_of_models() -> None:
    with pytest.raises(ValueError, match="models: must be a sequence of names, got the text 'shapes'"):
        EngineConfig(models="shapes")  # type: ignore[arg-type]
