"""Pictures as bytes and files: encoding uint8 RGB arrays, names made from prompts, atomic writes.

Encoding takes milliseconds: async callers leave it to `Encoders`. Knows nothing of engines or servers.
"""

import io
import os
import re
import secrets
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from tetrion.engine.request import Delivery, ImageResult
from tetrion.entrypoints import png
from tetrion.entrypoints.errors import InputError

PictureFormat = Delivery
MEDIA_TYPES: dict[PictureFormat, str] = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}
MAX_SLUG_CHARS = 60
TEMPORARY_PREFIX = ".tetrion-"


def encode(
    image: np.ndarray,
    picture_format: PictureFormat = "png",
    compression: int | None = None,
    text: Mapping[str, str] | None = None,
    each: png.Each = map,
) -> bytes:
    """Encode `image` (uint8 RGB [H, W, 3]).

    `compression` (0–100, webp and jpeg only) is the quality to keep, as in OpenAI's API: 100 keeps most. `text` becomes
    tEXt chunks of a PNG (iTXt where Latin-1 does not suffice); the other formats carry none. `each`: who makes the
    parts of a PNG, which has the same bytes whoever does.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    if picture_format == "png":
        return png.encode(image, text, each)
    picture, buffer = Image.fromarray(image), io.BytesIO()
    if picture_format == "webp":
        picture.save(buffer, "WEBP", quality=100 if compression is None else compression, method=4)
    else:
        picture.save(buffer, "JPEG", quality=95 if compression is None else compression)
    return buffer.getvalue()


def metadata(result: ImageResult) -> dict[str, str]:
    """What a PNG tells about how it was drawn."""
    return {
        "prompt": result.prompt,
        "seed": str(result.seed),
        "size": f"{result.width}x{result.height}",
        "steps": str(result.num_steps),
        "model": result.model,
        "software": "tetrion",
    }


def read_text(path: Path) -> dict[str, str]:
    """The text that `encode` put into the PNG at `path`; empty for any other file. Decodes no pixels."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return {str(key): value for key, value in picture.info.items() if isinstance(value, str)}
    except (OSError, ValueError, Image.DecompressionBombError):
        return {}


def slug(prompt: str) -> str:
    """A prompt as a file name: lower-case ASCII words joined by `-`, at most MAX_SLUG_CHARS, cut between words."""
    ascii_text = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = re.findall(r"[a-z0-9]+", ascii_text)
    name = "-".join(words)
    if len(name) > MAX_SLUG_CHARS:
        name = name[: MAX_SLUG_CHARS + 1].rpartition("-")[0] or name[:MAX_SLUG_CHARS]
    return name or "picture"


def compact_degrees(degrees: tuple[int, ...]) -> str:
    """`(1, 1, 2, 2, 2)` as `1×2 2×3`: each degree with the number of steps it lasted."""
    runs: list[list[int]] = []
    for degree in degrees:
        if runs and runs[-1][0] == degree:
            runs[-1][1] += 1
        else:
            runs.append([degree, 1])
    return " ".join(f"{degree}×{count}" for degree, count in runs)


def prepare_folder(folder: Path) -> None:
    """Create `folder` if need be and prove that files can be written to it. Raises InputError."""
    probe = folder / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise InputError(f"output: cannot write to folder {str(folder)!r}: {error.strerror}") from None


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that readers see the old file or the whole new one."""
    temporary = _write_temporary(path, data)
    try:
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_new_file(folder: Path, stem: str, suffix: str, data: bytes) -> Path:
    """Write `data` to `<stem><suffix>`, or to `<stem>-2<suffix>`, `-3`, … if taken; never over an existing file.

    The file appears whole or not at all. Returns its path.
    """
    temporary = _write_temporary(folder / f"{stem}{suffix}", data)
    try:
        number = 1
        while True:
            path = folder / (f"{stem}{suffix}" if number == 1 else f"{stem}-{number}{suffix}")
            if _rename_to_new(temporary, path):
                return path
            number += 1
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError from within name `path`: of itself that of a full disk names no file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write_temporary(path: Path, data: bytes) -> Path:
    """Write what is to be at `path` beside it."""
    temporary = path.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}.tmp"
    try:
        with naming(path):
            temporary.write_bytes(data)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _rename_to_new(temporary: Path, path: Path) -> bool:
    """Give `temporary` the name `path` unless that is taken. Unlike a rename, a hard link fails if it is."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if path.exists():
            return False
        os.rename(temporary, path)
    return True
