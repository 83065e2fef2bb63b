"""Encodings, file names, atomic writes."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tetrion.entrypoints import pictures
from tetrion.entrypoints.errors import InputError


def noise(height: int = 48, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_png_is_lossless_and_carries_text() -> None:
    image = noise()
    text = {"prompt": "a red circle", "seed": "7"}
    decoded = Image.open(io.BytesIO(pictures.encode(image, "png", text=text)))
    assert np.array_equal(np.asarray(decoded), image)
    assert decoded.text == text  # type: ignore[attr-defined]


def test_png_carries_text_beyond_latin_1() -> None:
    decoded = Image.open(io.BytesIO(pictures.encode(noise(), text={"prompt": "красный круг 🔴"})))
    assert decoded.text["prompt"] == "красный круг 🔴"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("picture_format", "pillow_name"), [("webp", "WEBP"), ("jpeg", "JPEG")])
def test_lossy_formats_are_smaller_with_lower_quality(picture_format: pictures.PictureFormat, pillow_name: str) -> None:
    image = noise(128, 128)
    best, worst = pictures.encode(image, picture_format, 100), pictures.encode(image, picture_format, 5)
    decoded = Image.open(io.BytesIO(best))
    assert (decoded.format, decoded.size) == (pillow_name, (128, 128))
    assert len(worst) < len(best) / 2


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_other_arrays_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        pictures.encode(image)


@given(st.text(max_size=300))
def test_slug_is_a_safe_short_file_name(prompt: str) -> None:
    name = pictures.slug(prompt)
    assert 1 <= len(name) <= pictures.MAX_SLUG_CHARS
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert not name.startswith("-") and not name.endswith("-")


def test_slug_keeps_words() -> None:
    assert pictures.slug("A small red circle, left of a Café!") == "a-small-red-circle-left-of-a-cafe"
    assert pictures.slug("word " * 40) == "-".join(["word"] * 12)
    assert pictures.slug("???") == "picture"


def test_compact_degrees() -> None:
    assert pictures.compact_degrees((1, 1, 1, 1, 2, 2, 1)) == "1×4 2×2 1×1"
    assert pictures.compact_degrees(()) == ""


def test_new_files_take_free_names(tmp_path: Path) -> None:
    names = [pictures.write_new_file(tmp_path, "a", ".png", bytes([i])).name for i in range(3)]
    assert names == ["a.png", "a-2.png", "a-3.png"]
    assert [(tmp_path / name).read_bytes() for name in names] == [b"\0", b"\1", b"\2"]
    assert len(list(tmp_path.iterdir())) == 3


def test_new_files_take_free_names_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: object, target: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", no_links)
    names = [pictures.write_new_file(tmp_path, "a", ".png", bytes([i])).name for i in range(2)]
    assert names == ["a.png", "a-2.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-2.png", "a.png"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kept.png").write_bytes(b"old")

    def fail(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space"):
        pictures.replace_file(tmp_path / "kept.png", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.png"]
    assert (tmp_path / "kept.png").read_bytes() == b"old"


def test_a_full_disk_is_told_with_the_files_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill)
    for write in (
        lambda: pictures.replace_file(tmp_path / "a.png", b"new"),
        lambda: pictures.write_new_file(tmp_path, "a", ".png", b"new"),
    ):
        with pytest.raises(OSError) as failure:
            write()
        assert str(failure.value) == f"[Errno 28] No space left on device: '{tmp_path / 'a.png'}'"
    assert list(tmp_path.iterdir()) == []


def test_text_is_read_from_a_png_only(tmp_path: Path) -> None:
    text = {"prompt": "красный круг", "seed": "7"}
    for name, data in (
        ("a.png", pictures.encode(noise(), text=text)),
        ("half.png", pictures.encode(noise(), text=text)[:50]),
        ("a.webp", pictures.encode(noise(), "webp")),
        ("notes.png", b"no picture"),
    ):
        (tmp_path / name).write_bytes(data)
        assert pictures.read_text(tmp_path / name) == (text if name == "a.png" else {})
    assert pictures.read_text(tmp_path) == pictures.read_text(tmp_path / "none.png") == {}


def test_prepare_folder_creates_and_leaves_no_probe(tmp_path: Path) -> None:
    pictures.prepare_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_prepare_folder_refuses_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="output: cannot write to folder"):
        pictures.prepare_folder(tmp_path / "out")
