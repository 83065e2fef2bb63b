"""Pictures as callers have them become uint8 RGB, within bounds; anything else is refused by field."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tetrion.engine import pictures
from tetrion.engine.errors import RequestError
from tetrion.engine.pictures import FORMATS, MAX_FILE_BYTES, MAX_PIXELS, Picture, mask_of, read_mask, read_picture

WIDTH, HEIGHT = 20, 12
ORIENTATION = 0x0112


def wave(width: int = WIDTH, height: int = HEIGHT, channels: int = 3) -> np.ndarray:
    grid = np.arange(height * width * channels).reshape(height, width, channels)
    return (128 + 100 * np.sin(grid / 40.0)).astype(np.uint8)


def encoded(array: np.ndarray, picture_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, picture_format, **options)
    return file.getvalue()


def refusal(value: object) -> str:
    with pytest.raises(RequestError) as caught:
        read_picture("pictures", value)
    assert caught.value.field == "pictures" and str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize("picture_format", FORMATS)
def test_formats_are_told_by_what_is_in_a_file(picture_format: str, tmp_path: Path) -> None:
    data = encoded(wave(), picture_format)
    path = tmp_path / "picture.txt"
    path.write_bytes(data)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for value in (data, bytearray(data), memoryview(data), path, str(path)):
        assert np.array_equal(read_picture("pictures", value).pixels, expected)


@pytest.mark.parametrize("picture_format", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_refused(picture_format: str) -> None:
    assert "is no PNG or JPEG or WEBP file that can be read" in refusal(encoded(wave(), picture_format))


def test_arrays_and_images_mean_themselves() -> None:
    array = wave()
    for value in (array, Image.fromarray(array), np.asfortranarray(array), Picture(array)):
        picture = read_picture("pictures", value)
        assert np.array_equal(picture.pixels, array) and picture.size == (WIDTH, HEIGHT) and picture.alpha is None
    array[:] = 0
    assert read_picture("pictures", wave()).pixels.any(), "it is a copy"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_as_exif_says(orientation: int) -> None:
    stripes = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    stripes[: HEIGHT // 2] = 255
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture = read_picture("pictures", encoded(stripes, "PNG", exif=exif))
    expected = {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}[orientation]
    assert np.array_equal(picture.pixels, np.rot90(stripes, expected))


def test_damaged_exif_says_nothing() -> None:
    assert read_picture("pictures", encoded(wave(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff")).size == (WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("mode", "colour"),
    [("L", 200), ("1", 1), ("P", 3), ("LA", (200, 255)), ("CMYK", (10, 20, 30, 40)), ("YCbCr", (100, 90, 80))],
)
def test_modes_of_files_become_rgb(mode: str, colour: Any) -> None:
    image = Image.new(mode, (WIDTH, HEIGHT), colour)
    assert np.array_equal(read_picture("pictures", image).pixels, np.asarray(image.convert("RGB")))


def test_sixteen_bits_of_grey_are_scaled() -> None:
    deep = np.full((HEIGHT, WIDTH), 128 * 257, np.uint16)
    assert (read_picture("pictures", encoded(deep)).pixels == 128).all()


def test_alpha_is_flattened_on_white_and_kept() -> None:
    rgba = np.dstack([np.zeros((HEIGHT, WIDTH, 3), np.uint8), np.full((HEIGHT, WIDTH), 255, np.uint8)])
    assert read_picture("pictures", rgba).alpha is None
    rgba[:, : WIDTH // 2, 3] = 0
    for value in (rgba, encoded(rgba), encoded(rgba, "WEBP", lossless=True)):
        picture = read_picture("pictures", value)
        assert (picture.pixels[:, : WIDTH // 2] == 255).all() and (picture.pixels[:, WIDTH // 2 :] == 0).all()
        mask = mask_of(picture)
        assert mask is not None and (mask[:, : WIDTH // 2] == 255).all() and not mask[:, WIDTH // 2 :].any()


def test_a_mask_is_where_it_is_transparent_else_where_it_is_white() -> None:
    left = np.zeros((HEIGHT, WIDTH), np.uint8)
    left[:, : WIDTH // 2] = 255
    as_alpha = np.dstack([wave(), 255 - left])
    for value in (left, np.dstack([left] * 3), encoded(left), as_alpha, encoded(as_alpha)):
        mask = read_mask("mask", value, (2 * WIDTH, 2 * HEIGHT))
        assert mask.shape == (2 * HEIGHT, 2 * WIDTH) and set(np.unique(mask)) == {0, 255}
        assert mask[:, : WIDTH - 2].all() and not mask[:, WIDTH + 2 :].any()
        assert np.array_equal(read_mask("mask", mask, (2 * WIDTH, 2 * HEIGHT)), mask), (
            "reading it again changes nothing"
        )


def test_resizing_is_lanczos_and_of_the_same_size_nothing() -> None:
    picture = read_picture("pictures", wave())
    assert picture.resized(picture.size) is picture
    expected = Image.fromarray(wave()).resize((33, 17), Image.Resampling.LANCZOS)
    assert np.array_equal(picture.resized((33, 17)).pixels, np.asarray(expected))


# Bounds -----------------------------------------------------------------------------------------------------------


def png_of(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header says so; decoding it would take that much memory."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = zlib.compress(data or bytes(1))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(MAX_PIXELS // 2000 + 1, 2000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_picture_that_says_it_is_huge_is_not_decoded(size: tuple[int, int]) -> None:
    said = refusal(png_of(*size))
    assert f"{MAX_PIXELS} pixels" in said or "cannot" in said or "is no PNG" in said


@pytest.mark.parametrize("size", [(7, 64), (64, 7), (16_385, 8), (0, 8)])
def test_sides_have_bounds(size: tuple[int, int]) -> None:
    said = refusal(np.zeros((size[1], size[0], 3), np.uint8))
    assert "sides from 8 to 16384 pixels" in said


def test_files_have_a_bound_wherever_they_are(tmp_path: Path) -> None:
    assert f"more than {MAX_FILE_BYTES} bytes" in refusal(bytes(MAX_FILE_BYTES + 1))
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(1 << 40)
    assert f"more than {MAX_FILE_BYTES} bytes" in refusal(tmp_path / "large.png")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert "is no file" in refusal(tmp_path / "pipe.png")
    assert "cannot read" in refusal(tmp_path) or "is no file" in refusal(tmp_path)
    assert "is no file" in refusal("/dev/zero")
    assert "cannot read" in refusal(tmp_path / "none.png")
    assert "cannot read" in refusal("a\0b.png")
    assert "characters" in refusal("a" * 5000)


@pytest.mark.parametrize("value", [None, 3, {}, object(), np.zeros((8, 8)), np.zeros((8, 8, 2), np.uint8), [b""]])
def test_what_is_no_picture_is_refused_by_field(value: object) -> None:
    assert refusal(value)


@pytest.mark.parametrize("picture_format", FORMATS)
@settings(deadline=None)
@given(data=st.data())
def test_damaged_files_are_read_or_refused_and_nothing_else(picture_format: str, data: st.DataObject) -> None:
    good = bytearray(encoded(wave(), picture_format))
    for _ in range(data.draw(st.integers(1, 8))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(good[: data.draw(st.integers(1, len(good)))])
    try:
        picture = read_picture("pictures", damaged)
    except RequestError as error:
        assert error.field == "pictures"
    else:
        assert picture.pixels.dtype == np.uint8 and picture.pixels.shape[2] == 3


def test_text_that_inflates_without_end_is_not_read_to_its_end() -> None:
    """A chunk of text beside a small picture."""
    good = encoded(wave())
    bomb = b"a\0\0" + zlib.compress(bytes(64 << 20), 9)
    chunk = struct.pack(">I", len(bomb)) + b"zTXt" + bomb + struct.pack(">I", zlib.crc32(b"zTXt" + bomb))
    assert "is no PNG or JPEG or WEBP file that can be read" in refusal(good[:33] + chunk + good[33:])


def test_several_are_a_list_of_at_most_so_many() -> None:
    read = pictures.read_pictures
    assert len(read("pictures", wave(), 2)) == 1
    assert len(read("pictures", [wave(), encoded(wave())], 2)) == 2
    assert len(read("pictures", np.stack([wave(), wave()]), 2)) == 2
    with pytest.raises(RequestError, match="pictures: has 3 pictures, at most 2 are taken"):
        read("pictures", [wave()] * 3, 2)
