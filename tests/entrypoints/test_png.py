"""Our PNG encoder against a strict reader of its own, and Pillow."""

import io
import struct
import threading
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tetrion.entrypoints import png

T = TypeVar("T")
R = TypeVar("R")
KINDS = ("flat", "noise", "gradient", "photograph", "tiles", "half")


def drawn(kind: str, height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3]."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = np.sin(rows / 17 + seed)[..., None] + np.cos(columns[..., None] / np.array([23, 29, 31]))
    smooth = 128 + 60 * waves
    match kind:
        case "flat":
            image = np.broadcast_to(random.integers(0, 256, 3), (height, width, 3))
        case "noise":
            image = random.integers(0, 256, (height, width, 3))
        case "gradient":
            image = smooth
        case "photograph":
            image = smooth + random.normal(0, 1.5, smooth.shape)
        case "tiles":
            image = random.integers(0, 256, (16, 16, 3))[rows % 16, columns % 16]
        case _:
            image = np.where((columns < width // 2)[..., None], smooth, random.integers(0, 256, smooth.shape))
    return np.clip(image, 0, 255).astype(np.uint8)


def chunks_of(data: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and data of each chunk; what is wrong with any is an AssertionError."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = [], 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert len(body) == length < 2**31
        assert struct.unpack_from(">I", data, at + 8 + length)[0] == zlib.crc32(kind + body)
        chunks.append((kind, body))
        at += 12 + length
    return chunks


def check_strictly(data: bytes, height: int, width: int) -> None:
    """As pngcheck does."""
    chunks = chunks_of(data)
    kinds = [kind for kind, _ in chunks]
    assert kinds[0] == b"IHDR" and kinds[-1] == b"IEND" and kinds.count(b"IEND") == kinds.count(b"IHDR") == 1
    first = kinds.index(b"IDAT")
    assert kinds[first:-1] == [b"IDAT"] * (len(kinds) - first - 1)
    assert chunks[0][1] == struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0) and chunks[-1][1] == b""
    stream = zlib.decompressobj()
    raw = stream.decompress(b"".join(body for kind, body in chunks if kind == b"IDAT"))
    assert stream.eof and not stream.unused_data  # zlib has checked the Adler-32
    assert len(raw) == height * (1 + 3 * width) and set(raw[:: 1 + 3 * width]) <= set(range(5))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 70), st.integers(1, 70), st.integers(0, 9))
def test_every_pixel_comes_back(kind: str, height: int, width: int, seed: int) -> None:
    image = drawn(kind, height, width, seed)
    data = png.encode(image)
    check_strictly(data, height, width)
    decoded = Image.open(io.BytesIO(data))
    assert decoded.mode == "RGB" and np.array_equal(np.asarray(decoded), image)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_of_several_strips_has_the_same_bytes_whoever_makes_them(kind: str) -> None:
    image = drawn(kind, 701, 333)
    makers = set()

    def each(function: Callable[[T], R], items: Iterable[T], /) -> list[R]:
        def made(item: T) -> R:
            makers.add(threading.get_ident())
            return function(item)

        with ThreadPoolExecutor(3) as threads:
            return list(threads.map(made, items))

    data = png.encode(image, {"prompt": "a star"}, each)
    assert data == png.encode(image, {"prompt": "a star"}) and threading.get_ident() not in makers
    check_strictly(data, 701, 333)
    assert [kind for kind, _ in chunks_of(data)].count(b"IDAT") > 2
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), image)


@pytest.mark.parametrize("shape", [(1, 1), (1, 200_000), (200_000, 1), (3, 65_537)])
def test_pictures_of_odd_proportions(shape: tuple[int, int]) -> None:
    image = drawn("photograph", *shape)
    data = png.encode(image)
    check_strictly(data, *shape)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), image)


def test_arrays_need_not_be_contiguous() -> None:
    image = drawn("photograph", 64, 96)
    for view in (image[::2, ::3], image[::-1], image.swapaxes(0, 1)):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png.encode(view)))), view)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.sampled_from(["prompt", "seed", "model"]), st.text(max_size=200)))
def test_text_is_what_pillow_would_have_written(text: dict[str, str]) -> None:
    decoded = Image.open(io.BytesIO(png.encode(drawn("flat", 4, 4), text)))
    assert decoded.text == text  # type: ignore[attr-defined]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=3000), st.binary(max_size=3000), st.integers(0, 200_000))
def test_checksums_are_combined(first: bytes, second: bytes, repeated: int) -> None:
    second += b"\xff" * repeated
    assert png._combined(zlib.adler32(first), zlib.adler32(second), len(second)) == zlib.adler32(first + second)


@pytest.mark.parametrize("kind", ["flat", "gradient", "photograph", "half"])
def test_files_are_hardly_larger_than_pillows(kind: str) -> None:
    image, buffer = drawn(kind, 512, 512), io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    assert len(png.encode(image)) <= 1.1 * len(buffer.getvalue())


def test_what_repeats_is_found_again() -> None:
    """Though each row by itself looks like noise."""
    image = drawn("tiles", 512, 512)
    assert len(png.encode(image)) < image.nbytes / 50
