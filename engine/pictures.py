"""Pictures that requests bring: from what a caller has (a PIL image, an array, a file) to uint8 RGB of one size.

Owns which formats are read, and how large a file and its picture may be; nothing is decoded beyond these. Decoding and
resizing take milliseconds: callers on an event loop leave them to a thread. What a model does with a picture, and how
many it takes, is `resolve.py`'s.
"""

import contextlib
import io
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from tetrion.engine.errors import RequestError, shown
from tetrion.engine.shape import Size

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_FILE_BYTES = 20 << 20
MAX_PIXELS = 32_000_000
MAX_SIDE = 16_384
MIN_SIDE = 8
MAX_PATH_CHARS = 4096
OPAQUE = 255
DRAWN = 255
"""In a mask: here the picture is drawn anew. Elsewhere it is 0."""
HALF = 128

Pixels = npt.NDArray[np.uint8]


class Picture:
    """A decoded picture, which nobody changes. `pixels`: uint8 RGB [height, width, 3]. `alpha`: uint8 [height, width]
    of one that is not opaque everywhere, on white in `pixels`."""

    __slots__ = ("alpha", "pixels")

    def __init__(self, pixels: Pixels, alpha: Pixels | None = None) -> None:
        self.pixels, self.alpha = pixels, alpha

    def __repr__(self) -> str:
        return f"Picture({self.size[0]}x{self.size[1]})"

    @property
    def size(self) -> Size:
        """(width, height) in pixels."""
        height, width = self.pixels.shape[:2]
        return width, height

    @property
    def num_bytes(self) -> int:
        return self.pixels.nbytes + (0 if self.alpha is None else self.alpha.nbytes)

    def resized(self, size: Size) -> "Picture":
        """As diffusers resizes: by Lanczos, without regard to the shape."""
        if size == self.size:
            return self
        pixels, alpha = (None if layer is None else _resized(layer, size) for layer in (self.pixels, self.alpha))
        assert pixels is not None
        return Picture(pixels, alpha)

    def cropped(self, size: Size) -> "Picture":
        """The middle of it, where it is larger."""
        if size == self.size:
            return self
        (left, top), (width, height) = ((own - side) // 2 for own, side in zip(self.size, size, strict=True)), size
        rows, columns = slice(top, top + height), slice(left, left + width)
        pixels, alpha = (None if layer is None else _cut(layer, rows, columns) for layer in (self.pixels, self.alpha))
        assert pixels is not None
        return Picture(pixels, alpha)


def read_pictures(field: str, value: object, at_most: int) -> tuple[Picture, ...]:
    """Of one, or a list of several: see `read_picture`. Raises RequestError."""
    several = isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim == 4)
    given: list[Any] = list(value) if several else [value]  # type: ignore[call-overload]
    if len(given) > at_most:
        raise RequestError(field, f"has {len(given)} pictures, at most {at_most} are taken")
    return tuple(read_picture(field, one) for one in given)


def read_picture(field: str, value: object) -> Picture:
    """Of a PIL image, an array (uint8 [height, width, 3], or 4 with alpha), a file's bytes or its path. A file is a
    PNG, JPEG or WebP by what is in it, whatever it is called. Raises RequestError naming the bound."""
    if isinstance(value, Picture):
        return value
    if isinstance(value, np.ndarray):
        return _of_array(field, value)
    if isinstance(value, Image.Image):
        return _of_image(field, value)
    if isinstance(value, bytes | bytearray | memoryview):
        return _of_file(field, value)
    if isinstance(value, str | os.PathLike):
        return _of_file(field, read_file(field, value))
    kinds = f"a PIL image, an array, bytes or the path of a {' or '.join(FORMATS)} file"
    raise RequestError(field, f"must be {kinds}, got {shown(value)}")


def mask_of(picture: Picture) -> Pixels | None:
    """Where a picture is to be drawn anew by its alpha, as OpenAI has it: DRAWN where it is fully transparent, else 0.
    None if it is opaque."""
    return None if picture.alpha is None else np.where(picture.alpha == 0, np.uint8(DRAWN), np.uint8(0))


def read_mask(field: str, value: object, size: Size) -> Pixels:
    """DRAWN or 0, uint8 [height, width] of `size`. Of a picture that is not opaque its alpha counts, of another one its
    brightness: white is drawn anew, as diffusers has it. Raises RequestError."""
    if isinstance(value, np.ndarray) and value.ndim == 2:
        value = np.repeat(value[..., None], 3, axis=2)
    picture = read_picture(field, value)
    mask = mask_of(picture)
    if mask is None:
        mask = np.asarray(Image.fromarray(picture.pixels).convert("L"))
    if mask.shape != size[::-1]:
        mask = _resized(mask, size)
    return _frozen(np.where(mask >= HALF, np.uint8(DRAWN), np.uint8(0)))


# Reading ----------------------------------------------------------------------------------------------------------


def read_file(field: str, path: str | os.PathLike[Any]) -> bytes:
    """As far as it may be large. A regular file: others may have no end, or wait for ever. Raises RequestError."""
    if len(os.fspath(path)) > MAX_PATH_CHARS:
        raise RequestError(field, f"is a path of more than {MAX_PATH_CHARS} characters")
    try:
        with open(Path(os.fsdecode(path)).expanduser(), "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise RequestError(field, f"{shown(os.fsdecode(path))} is no file")
            return file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, RequestError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise RequestError(field, f"cannot read {shown(os.fsdecode(path))}: {reason}") from None


def _without_waiting(path: str, flags: int) -> int:
    """For the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _of_file(field: str, data: bytes | bytearray | memoryview) -> Picture:
    if len(data) > MAX_FILE_BYTES:
        raise RequestError(field, f"has more than {MAX_FILE_BYTES} bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _of_image(field, image)
    except RequestError:
        raise
    except Image.DecompressionBombError:
        raise RequestError(field, f"has more than {MAX_PIXELS} pixels") from None
    except Exception as error:  # whatever a decoder makes of damage
        reason = "it is none" if isinstance(error, Image.UnidentifiedImageError) else error
        raise RequestError(field, f"is no {' or '.join(FORMATS)} file that can be read: {shown(str(reason))}") from None


def _of_image(field: str, image: Image.Image) -> Picture:
    """The first picture of a moving one, turned as its EXIF says."""
    _check_size(field, image.size)
    try:
        image.load()
        with contextlib.suppress(Exception):  # of damaged EXIF nothing is known
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = _of_deep_grey(image)
        if not image.has_transparency_data:
            return Picture(_frozen(np.array(image.convert("RGB"))))
        return _on_white(np.asarray(image.convert("RGBA")))
    except MemoryError:
        raise
    except Exception as error:  # it is read only now
        raise RequestError(field, f"cannot be decoded: {shown(str(error))}") from None


def _of_deep_grey(image: Image.Image) -> Image.Image:
    """16 bits a pixel, whatever they are kept in."""
    return Image.fromarray((np.asarray(image).clip(0, 65_535) / 257).round().astype(np.uint8))


def _of_array(field: str, array: npt.NDArray[Any]) -> Picture:
    array = np.asarray(array)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (3, 4):
        got = f"{array.dtype} {list(array.shape)}"
        raise RequestError(field, f"must be a uint8 array [height, width, 3] or [height, width, 4], got {got}")
    height, width, channels = array.shape
    _check_size(field, (width, height))
    return _on_white(array) if channels == 4 else Picture(_frozen(np.array(array, order="C")))


def _check_size(field: str, size: Size) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise RequestError(field, f"has more than {MAX_PIXELS} pixels: {width}x{height}")
    if min(size) < MIN_SIDE or max(size) > MAX_SIDE:
        raise RequestError(field, f"must have sides from {MIN_SIDE} to {MAX_SIDE} pixels, got {width}x{height}")


def _on_white(rgba: npt.NDArray[np.uint8]) -> Picture:
    alpha = rgba[..., 3]
    if alpha.min() == OPAQUE:
        return Picture(_frozen(np.array(rgba[..., :3], order="C")))
    image = Image.fromarray(np.ascontiguousarray(rgba))
    white = Image.new("RGBA", image.size, "white")
    flat = Image.alpha_composite(white, image).convert("RGB")
    return Picture(_frozen(np.array(flat)), _frozen(np.array(alpha)))


def _resized(layer: Pixels, size: Size) -> Pixels:
    return _frozen(np.array(Image.fromarray(layer).resize(size, Image.Resampling.LANCZOS)))


def _cut(layer: Pixels, rows: slice, columns: slice) -> Pixels:
    return _frozen(np.ascontiguousarray(layer[rows, columns]))


def _frozen(array: Pixels) -> Pixels:
    array.flags.writeable = False
    return array
