"""Finding a checkpoint folder, without torch."""

import subprocess
import sys

import pytest

from tetrion.engine.families.locate import embedded_models, hub_revision, resolve_model
from tetrion.engine.model_spec import CheckpointError


def test_embedded_name() -> None:
    path = resolve_model("shapes")
    assert (path / "model_index.json").is_file()
    assert embedded_models()["shapes"] == path


def test_path(tmp_path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_folder_may_be_called_like_a_revision(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name@v1").mkdir(parents=True)
    assert resolve_model("owner/name@v1").samefile(tmp_path / "owner/name@v1")
    assert hub_revision("owner/name@v1") is None
    assert hub_revision("owner/name@v2") == "v2"
    assert hub_revision("owner/name") is None


@pytest.mark.parametrize(
    "revision", ["", " ", "..", "a/../b", "a//b", "-x", "a b", "a\nb", "a\0", "é\u202e", "x" * 300]
)
def test_what_cannot_be_a_revision_is_not_asked_for(revision, monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="cannot be a revision: a branch, tag or commit"):
        resolve_model(f"owner/name@{revision}")


@pytest.mark.parametrize("name", ["", "x" * 5000, "a\0b", "no-such-model", "../shapes", "__pycache__"])
def test_neither(name) -> None:
    with pytest.raises(CheckpointError, match=r"neither a folder nor an embedded model .*shapes"):
        resolve_model(name)


def test_engine_process_modules_import_no_torch() -> None:
    code = (
        "import sys, tetrion.engine.families.locate as l; from tetrion.engine.families.registry import read_model_spec;"
        "read_model_spec(l.resolve_model('shapes')); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
