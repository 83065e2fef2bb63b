"""Files of measurements: whole or not at all, and where none can be written."""

from pathlib import Path

import pytest

from tests.entrypoints.bench.conftest import small_disk
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.record import check_writable, write_whole


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "R.json"
    write_whole(path, b"before")
    with small_disk(), pytest.raises(OSError, match="File too large"):
        write_whole(path, b"x" * 1000)
    assert path.read_bytes() == b"before" and list(path.parent.iterdir()) == [path]


def test_a_folder_in_the_way_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "R.json").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "R.json", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["R.json"]


def test_where_no_file_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("R.json").write_text("")
    for name in ("R.json", "other.json", "new/folder/R.json", str(tmp_path / "R.json")):
        check_writable(Path(name), "output")
    for name in (".", "/dev/null", "R.json/R.json", "R.json/new/R.json"):
        with pytest.raises(InputError, match="output: "):
            check_writable(Path(name), "output")
    monkeypatch.setattr("os.access", lambda *_: False)  # tests may run as root, who may write everywhere
    with pytest.raises(InputError, match="can be written to"):
        check_writable(Path("R.json"), "output")
    assert [path.name for path in tmp_path.iterdir()] == ["R.json"]
