"""What makes two folders the same checkpoint, and what does not."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tetrion.engine.families.locate import resolve_model
from tetrion.engine.measure import checkpoint_identity as module
from tetrion.engine.measure.checkpoint_identity import SAMPLE_BYTES, checkpoint_identity

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
NUM_VALUES = 20 * SAMPLE_BYTES


def save(folder: Path, scale_of_second: float = 1.0) -> None:
    values = np.linspace(1.0, 2.0, NUM_VALUES, dtype=np.float32)
    save_file({"first": values, "second": values * np.float32(scale_of_second), "third": values[:5]}, folder / WEIGHTS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    for name in ("transformer", "scheduler"):
        (path / name).mkdir(parents=True)
    (path / "scheduler" / "scheduler_config.json").write_text('{"shift": 3.0}')
    save(path)
    return path


def test_copies_and_foreign_files_do_not_count(folder: Path, tmp_path: Path) -> None:
    identity = checkpoint_identity(folder, "safetensors")
    copy = tmp_path / "elsewhere" / "of another name"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    os.utime(copy / WEIGHTS, (1, 1))
    (copy / "README.md").write_text("a copy")
    (copy / "all-in-one.safetensors").write_bytes(b"not read")
    assert checkpoint_identity(copy, "safetensors") == identity
    assert len(identity) == 32


def test_a_snapshot_of_links_is_its_files(folder: Path, tmp_path: Path) -> None:
    """As in the hub's cache."""
    for path in folder.rglob("*.*"):
        link = tmp_path / "snapshot" / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    assert checkpoint_identity(tmp_path / "snapshot", "safetensors") == checkpoint_identity(folder, "safetensors")


def scale_one_tensor(folder: Path) -> None:
    save(folder, scale_of_second=1.1)


def change_last_value(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def change_config(folder: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").write_text('{"shift": 1.0}')


def rename_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "transformer" / "other.safetensors")


@pytest.mark.parametrize("change", [scale_one_tensor, change_last_value, change_config, rename_weights])
def test_what_changes_the_pictures_changes_the_identity(folder: Path, change: Callable[[Path], None]) -> None:
    size, before = (folder / WEIGHTS).stat().st_size, checkpoint_identity(folder, "safetensors")
    change(folder)
    assert checkpoint_identity(folder, "safetensors") != before
    assert not (folder / WEIGHTS).exists() or (folder / WEIGHTS).stat().st_size == size


def test_random_weights_depend_on_configs_only(folder: Path) -> None:
    before = checkpoint_identity(folder, "dummy")
    assert before != checkpoint_identity(folder, "safetensors")
    scale_one_tensor(folder)
    assert checkpoint_identity(folder, "dummy") == before
    change_config(folder)
    assert checkpoint_identity(folder, "dummy") != before


def with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1",
        with_header(b"[]"),
        with_header(b'{"\xff": 1}'),
        with_header(b'{"a": {"data_offsets": [-5, 0]}}'),
        with_header(b'{"a": {"data_offsets": [0, 99999999999999999999999]}}'),
    ],
)
def test_a_damaged_file_is_left_to_who_loads_it(folder: Path, data: bytes) -> None:
    before = checkpoint_identity(folder, "safetensors")
    (folder / WEIGHTS).write_bytes(data)
    assert checkpoint_identity(folder, "safetensors") != before


def test_little_is_read_of_large_tensors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, parts = module._samples, []

    def watched(*arguments: object) -> list[bytes]:
        parts.extend(samples(*arguments))  # type: ignore[arg-type]
        return parts

    monkeypatch.setattr(module, "_samples", watched)
    checkpoint_identity(folder, "safetensors")
    header, *rest = map(len, parts)
    assert header < 1000 and len(rest) == 9
    assert rest[:6] == [SAMPLE_BYTES] * 6 and sum(rest) < (folder / WEIGHTS).stat().st_size / 10


def test_the_embedded_model_has_one() -> None:
    shapes = resolve_model("shapes")
    assert checkpoint_identity(shapes, "safetensors") != checkpoint_identity(shapes, "dummy")
