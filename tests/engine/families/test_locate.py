"""Finding a checkpoint folder, without torch."""

import subprocess
import sys

import pytest

from tetrion.engine.families.locate import embedded_models, resolve_model
from tetrion.engine.model_spec import CheckpointError


def test_embedded_name() -> None:
    path = resolve_model("shapes")
    assert (path / "model_index.json").is_file()
    assert embedded_models()["shapes"] == path


def test_path(tmp_path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["", "no-such-model", "../shapes", "__pycache__"])
def test_neither(name) -> None:
    with pytest.raises(CheckpointError, match=r"neither a folder nor an embedded model .*shapes"):
        resolve_model(name)


def test_engine_process_modules_import_no_torch() -> None:
    code = (
        "import sys, tetrion.engine.families.locate as l; from tetrion.engine.families.registry import read_model_spec;"
        "read_model_spec(l.resolve_model('shapes')); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
