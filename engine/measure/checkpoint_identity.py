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
from tetrion.engine.families.checkpoint import Preset, component_folder, read_preset
from tetrion.engine.families.files import MAX_BYTES
from tetrion.engine.families.locate import HUB_FILES
from tetrion.engine.families.weights import MAX_HEADER_BYTES

WEIGHTS_SUFFIX = ".safetensors"
SAMPLE_BYTES = 4096
"""Read at the start, the middle and the end of each tensor."""


class _Tensor(msgspec.Struct, frozen=True):
    """Of a tensor's entry in a header; offsets count from the header's end. `__metadata__` passes as an empty one."""

    data_offsets: tuple[int, int] = (0, 0)


def checkpoint_identity(folder: Path, load_format: LoadFormat) -> str:
    """32 hex digits made from the files that a model is loaded from: their paths in `folder`, sizes and contents, not
    their times. With `dummy` the weights' files do not count, as they are not read.

    Raises OSError if a file cannot be read. A damaged one counts as it is: loading it will tell.
    """
    digest = hashlib.sha256(load_format.encode())
    for name, path in sorted(_files(folder).items(), key=lambda item: Path(item[0])):
        has_weights = path.suffix == WEIGHTS_SUFFIX
        if has_weights and load_format == "dummy":
            continue
        size = path.stat().st_size
        digest.update(repr((name, size)).encode())
        with path.open("rb", buffering=0) as file:
            for part in _samples(file, size) if has_weights else (file.read(MAX_BYTES),):
                digest.update(part)
    return digest.hexdigest()[:32]


def _files(folder: Path) -> dict[str, Path]:
    """Name in the checkpoint -> file: its own, and those of components that it shares with another one."""
    found = {path for pattern in HUB_FILES for path in folder.glob(pattern) if _counts(path)}
    own = {str(path.relative_to(folder)): path for path in found}
    shared = read_preset(folder, Preset()).components_from
    return own | {
        f"{component}/{path.name}": path
        for component in shared
        for path in component_folder(folder, component).iterdir()
        if _counts(path)
    }


def _counts(path: Path) -> bool:
    """A system's own files beside a checkpoint's (`._config.json`) do not."""
    return path.is_file() and not path.name.startswith(".")


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
