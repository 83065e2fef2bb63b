"""Files of a checkpoint folder, whoever wrote it: read whole, up to a size, and only if they are what they should be.

Nothing here waits or takes much memory, whatever a folder holds: pipes, devices and files without end are no files.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from tetrion.engine.model_spec import CheckpointError

MAX_BYTES = 64 << 20
"""Of a file that is read whole; the largest tokenizers have half of it."""
POINTERS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
"""How a file begins that git-lfs leaves in another's place."""

_T = TypeVar("_T")


def fault(path: Path, text: str) -> CheckpointError:
    """What is wrong with a file or folder of a checkpoint."""
    return CheckpointError(f"model: {str(path)!r}{text}")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """An open file. Raises CheckpointError if it cannot be opened or read."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise fault(path, f" cannot be read: {error.strerror or error}") from None


def read_file(path: Path) -> bytes:
    """Raises CheckpointError unless it is a file of at most `MAX_BYTES`, and the file itself; OSError."""
    if not path.is_file():
        raise fault(path, " is not a file" if path.exists() else " is missing")
    with reading(path) as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise fault(path, f" is larger than {MAX_BYTES:,} bytes, which no such file is")
    refuse_pointer(path, content)
    return content


def refuse_pointer(path: Path, beginning: bytes) -> None:
    """Raises CheckpointError for a git-lfs pointer."""
    if beginning.startswith(POINTERS):
        raise fault(path, " is a pointer of git-lfs, not the file itself: get it with `git lfs pull`")


def decode(content: bytes, kind: type[_T], path: Path, what: str = " is not a JSON object") -> _T:
    """JSON as a value. Raises CheckpointError."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise fault(path, f"{what}: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError; OSError."""
    return decode(read_file(path), dict[str, Any], path)
