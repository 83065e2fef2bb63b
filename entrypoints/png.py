"""PNG files of RGB pictures, in strips that several threads can make at once.

A PNG's pixels are one zlib stream of rows, each behind the number of the filter that predicts it from its neighbours.
Here each strip of rows is filtered and deflated by itself and flushed to a whole byte, so that the strips one after
the other are one stream; each is an `IDAT` chunk. Where strips end depends on the picture's size alone, so a picture
has the same bytes whoever makes its strips. zlib-ng deflates, numpy filters, and both let go of the interpreter.

Filters: of Sub, Up and Average the one that leaves the least sum of magnitudes, for each row. Strips of photographs
leave hardly anything to find again: there, Huffman codes alone are smaller than what a search makes, and take a
quarter of its time. A sample of each strip decides.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from PIL.PngImagePlugin import PngInfo
from zlib_ng import zlib_ng

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")
R = TypeVar("R")

SIGNATURE = b"\x89PNG\r\n\x1a\n"
RGB, BITS = 2, 8
STRIP_BYTES = 1 << 19
BLOCK_BYTES = 1 << 16
"""Rows that are filtered together stay in a core's cache."""
SAMPLE_BYTES = 1 << 15
SEARCH_LEVEL, SAMPLE_LEVEL = 5, 3
WORTH_A_SEARCH = 0.97
"""Of the sample's size without one."""
ZLIB_HEADER = b"\x78\x5e"
RAW_DEFLATE, MEMORY_LEVEL = -15, 9
SUB, UP, AVERAGE = 1, 2, 3
ADLER_BASE = 65521


class Strip(NamedTuple):
    """A chunk of a PNG: `chunk` are its parts. `adler32` is of the `num_bytes` that it inflates to."""

    chunk: tuple[bytes, ...]
    adler32: int
    num_bytes: int


class Each(Protocol):
    """Calls the function with each of the items, in any order and maybe at once; returns the results in order."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T], /) -> Iterable[R]: ...


def encode(image: Bytes, text: Mapping[str, str] | None = None, each: Each = map) -> bytes:
    """The PNG of `image` (uint8 [H, W, 3], at least one pixel). `text`: for tEXt chunks (iTXt where Latin-1 does not
    suffice). `each`: who makes the strips."""
    height, width, _ = image.shape
    rows = np.ascontiguousarray(image).reshape(height, 3 * width)
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((BITS, RGB, 0, 0, 0))
    strips = list(each(lambda span: _strip(rows, span), _spans(height, 3 * width + 1)))
    adler32 = 1
    for strip in strips:
        adler32 = _combined(adler32, strip.adler32, strip.num_bytes)
    parts = [SIGNATURE, *_chunk(b"IHDR", header), *_text_chunks(text or {})]
    for strip in strips:
        parts += strip.chunk
    return b"".join((*parts, *_chunk(b"IDAT", adler32.to_bytes(4, "big")), *_chunk(b"IEND")))


def _spans(height: int, row_bytes: int) -> list[range]:
    """Rows of each strip."""
    num_rows = max(1, STRIP_BYTES // row_bytes)
    return [range(first, min(first + num_rows, height)) for first in range(0, height, num_rows)]


def _strip(rows: Bytes, span: range) -> Strip:
    """`rows`: all of the picture, [H, 3 W]."""
    filtered = _filtered(rows, span)
    stream = zlib_ng.compressobj(SEARCH_LEVEL, zlib_ng.DEFLATED, RAW_DEFLATE, MEMORY_LEVEL, _strategy(filtered))
    is_last = span.stop == len(rows)
    deflated = stream.compress(filtered), stream.flush(zlib_ng.Z_FINISH if is_last else zlib_ng.Z_SYNC_FLUSH)
    chunk = _chunk(b"IDAT", *(deflated if span.start else (ZLIB_HEADER, *deflated)))
    return Strip(chunk, zlib_ng.adler32(filtered), filtered.nbytes)


def _strategy(filtered: Bytes) -> int:
    """Whether it is worth looking for what was there before."""
    middle = (filtered.size - SAMPLE_BYTES) // 2
    sample = filtered.reshape(-1)[max(0, middle) :][:SAMPLE_BYTES]

    def size(strategy: int) -> int:
        stream = zlib_ng.compressobj(SAMPLE_LEVEL, zlib_ng.DEFLATED, RAW_DEFLATE, MEMORY_LEVEL, strategy)
        return len(stream.compress(sample)) + len(stream.flush())

    is_worth_it = size(zlib_ng.Z_DEFAULT_STRATEGY) < WORTH_A_SEARCH * size(zlib_ng.Z_HUFFMAN_ONLY)
    return zlib_ng.Z_DEFAULT_STRATEGY if is_worth_it else zlib_ng.Z_HUFFMAN_ONLY


# Filters ------------------------------------------------------------------------------------------------------------


def _filtered(rows: Bytes, span: range) -> Bytes:
    """[len(span), 1 + 3 W]: each row behind the number of its filter."""
    row_bytes = rows.shape[1]
    filtered = np.empty((len(span), 1 + row_bytes), np.uint8)
    num_rows = max(1, BLOCK_BYTES // row_bytes)
    for first in range(span.start, span.stop, num_rows):
        last = min(first + num_rows, span.stop)
        _filter_block(rows, first, last, filtered[first - span.start : last - span.start])
    return filtered


def _filter_block(rows: Bytes, first: int, last: int, filtered: Bytes) -> None:
    """Rows `first` to `last` into `filtered`. Arithmetic is modulo 256, as PNG has it."""
    num_rows, row_bytes = last - first, rows.shape[1]
    with_neighbours = np.zeros((num_rows + 1, row_bytes + 3), np.uint8)
    if first:
        with_neighbours[:, 3:] = rows[first - 1 : last]
    else:
        with_neighbours[1:, 3:] = rows[:last]
    here, left, above = with_neighbours[1:, 3:], with_neighbours[1:, :-3], with_neighbours[:-1, 3:]
    left_out = np.empty((3, num_rows, row_bytes), np.uint8)
    np.subtract(here, left, out=left_out[SUB - 1])
    np.subtract(here, above, out=left_out[UP - 1])
    mean = (left & above) + ((left ^ above) >> 1)  # ⌊(left + above) / 2⌋ without a ninth bit
    np.subtract(here, mean, out=left_out[AVERAGE - 1])
    magnitudes = np.abs(left_out.view(np.int8)).view(np.uint8).sum(axis=2, dtype=np.uint32)
    best = magnitudes.argmin(axis=0)
    filtered[:, 0] = best + 1
    filtered[:, 1:] = left_out[best, np.arange(num_rows)]


# Chunks -------------------------------------------------------------------------------------------------------------


def _chunk(kind: bytes, *data: bytes) -> tuple[bytes, ...]:
    crc = zlib_ng.crc32(kind)
    for part in data:
        crc = zlib_ng.crc32(part, crc)
    return sum(map(len, data)).to_bytes(4, "big"), kind, *data, crc.to_bytes(4, "big")


def _text_chunks(text: Mapping[str, str]) -> list[bytes]:
    """Pillow decides what goes into which kind of chunk."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    return [part for kind, data, *_ in info.chunks for part in _chunk(kind, data)]


def _combined(adler32: int, following: int, num_bytes: int) -> int:
    """The Adler-32 of two texts one after the other, from their own; the second has `num_bytes` (zlib's
    `adler32_combine`)."""
    low, high = adler32 & 0xFFFF, adler32 >> 16
    low_2, high_2 = following & 0xFFFF, following >> 16
    sum_low = (low + low_2 - 1) % ADLER_BASE
    sum_high = (high + high_2 + num_bytes * (low - 1)) % ADLER_BASE
    return sum_high << 16 | sum_low
