"""Which checkpoint a folder holds, whatever the folder is called and wherever it was copied from.

The small files are read whole; of the weights the headers and samples of every tensor, because reading tens of
gigabytes takes as long as loading them. Training, merging and scaling change a tensor everywhere and so show; an edit
by hand of a few values may not. No torch.
"""

import hashlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import msgspec

from tetrion.engine.config import LoadFormat
from tetrion.engine.models.locate import HUB_FILES

WEIGHTS_SUFFIX = ".safetensors"
SAMPLE_BYTES = 4096
"""Read at the start, the middle and the end of each tensor."""
MAX_HEADER_BYTES = 100_000_000
"""As in the safetensors library."""


class _Tensor(msgspec.Struct, frozen=True):
    """Of a tensor's entry in a header; offsets count from the header's end. `__metadata__` passes as an empty one."""

    data_offsets: tuple[int, int] = (0, 0)


def checkpoint_identity(folder: Path, load_format: LoadFormat) -> str:
    """32 hex digits made from the files that a model is loaded from: their paths in `folder`, sizes and contents, not
    their times. With `dummy` the weights' files do not count, as they are not read.

    Raises OSError if a file cannot be read. A damaged one counts as it is: loading it will tell.
    """
    digest = hashlib.sha256(load_format.encode())
    for path in sorted({path for pattern in HUB_FILES for path in folder.glob(pattern) if path.is_file()}):
        has_weights = path.suffix == WEIGHTS_SUFFIX
        if has_weights and load_format == "dummy":
            continue
        size = path.stat().st_size
        digest.update(repr((str(path.relative_to(folder)), size)).encode())
        with path.open("rb", buffering=0) as file:
            for part in _samples(file, size) if has_weights else (file.read(),):
                digest.update(part)
    return digest.hexdigest()[:32]


def _samples(file: FileIO, size: int) -> Iterator[bytes]:
    """The header (8 bytes of length, JSON), then the samples of each tensor in the order of the file."""
    length = int.from_bytes(file.read(8), "little")
    header = file.read(min(length, MAX_HEADER_BYTES))
    yield header
    try:
        spans = [tensor.data_offsets for tensor in msgspec.json.decode(header, type=dict[str, _Tensor]).values()]
    except (msgspec.DecodeError, UnicodeDecodeError):
        return
    start = 8 + length
    for begin, end in sorted(span for span in spans if 0 <= span[0] <= span[1] <= size - start):
        for offset in (begin, (begin + end) // 2, max(begin, end - SAMPLE_BYTES)):
            file.seek(start + offset)
            yield file.read(min(SAMPLE_BYTES, end - offset))
