"""A component's safetensors files: which of them are loaded, and what their headers say. Reads no tensor.

A component has one file, or shards with an index, each of them also as a variant (`model.fp16.safetensors`;
`model.fp16-00001-of-00002.safetensors` with `model.safetensors.index.fp16.json`). The plain form comes first; another
counts if it is the only one that is complete. What systems leave beside files (`._model.safetensors`) does not count.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from tetrion.engine.families.files import decode, fault, read_file, reading, refuse_pointer
from tetrion.engine.families.plan import Shape, some_of

PLAIN = ("diffusion_pytorch_model.safetensors", "model.safetensors")
SHARD = re.compile(r".*-\d+-of-\d+\.safetensors")
INDEX = re.compile(r".+\.safetensors\.index(\.[^.]+)?\.json")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf")
MAX_HEADER_BYTES = 100_000_000
"""As in the safetensors library."""
MAX_TENSORS = 100_000
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""What weights are stored in -> bytes of a number."""
COUNTERS = ("position_ids", "num_batches_tracked")
"""Whole numbers that some libraries store beside weights."""
QUANTIZED = frozenset(
    {
        *("SCB", "absmax", "quant_map", "nested_absmax", "nested_quant_map", "weight_format"),  # bitsandbytes
        *("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_zero_point", "weight_packed", "input_scale"),
        *("output_scale", "scale_weight", "scale_input", "scaled_fp8", "comfy_quant"),  # fp8
        *("qweight", "qzeros", "g_idx", "scales", "qscale", "wscales", "wzeros", "ascales"),  # GPTQ, AWQ, SVDQuant
        *("_data", "_scale", "_zero_point"),  # quanto
    }
)
"""Parts of the names of tensors that go with packed ones."""


_Count = Annotated[int, Meta(ge=0, le=2**62)]


class Tensor(msgspec.Struct, frozen=True):
    """Of a header. `data_offsets` count from the header's end."""

    dtype: str
    shape: Annotated[tuple[_Count, ...], Meta(max_length=16)]
    data_offsets: tuple[_Count, _Count]


class Candidate(NamedTuple):
    """One form of a component's weights. `path`: an index, or the only file. `files`: by tensor, of an index."""

    path: Path
    files: dict[str, Path] | None
    missing: tuple[str, ...] = ()


def weight_map(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a component. Raises CheckpointError; OSError."""
    chosen = _choose(folder)
    return dict.fromkeys(read_header(chosen.path), chosen.path) if chosen.files is None else chosen.files


def read_shapes(folder: Path) -> dict[str, Shape]:
    """The shape of each tensor of a component. Raises CheckpointError for files that are missing or damaged, and for
    quantized weights; OSError."""
    path, files, _ = _choose(folder)
    headers = {file: read_header(file) for file in (sorted(set(files.values())) if files is not None else [path])}
    if files is None:
        files = dict.fromkeys(headers[path], path)
    for name, file in files.items():
        if name not in headers[file]:
            raise fault(file, f" has no tensor {name}, though its index says so")
    for file, header in headers.items():
        _refuse_quantized(file, header)
    return {name: headers[file][name].shape for name, file in files.items() if not name.endswith(COUNTERS)}


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a file. Raises CheckpointError if it is damaged or cut off; OSError."""
    size = path.stat().st_size
    with reading(path) as file:
        beginning = file.read(64)
        refuse_pointer(path, beginning)
        length = int.from_bytes(beginning[:8], "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise _unreadable(path, f"its header is to have {length:,} bytes, the file has {size:,}")
        file.seek(8)
        content = file.read(length)
    what = " cannot be read as safetensors: its header"
    entries = decode(content, dict[str, msgspec.Raw], path, what)
    if len(entries) > MAX_TENSORS:
        raise _unreadable(path, f"its header has {len(entries):,} tensors, which no component has")
    decode(bytes(entries.pop("__metadata__", b"{}")), dict[str, str], path, f"{what}: __metadata__")
    tensors = {name: decode(bytes(entry), Tensor, path, f"{what}: {name}") for name, entry in entries.items()}
    _check_places(path, tensors, size - 8 - length)
    return tensors


def has_weights(folder: Path) -> bool:
    """Whether there are any safetensors files."""
    return any(path.suffix == ".safetensors" or INDEX.fullmatch(path.name) for path in _visible(folder))


def describe_files(folder: Path) -> str:
    """What there is in place of weights, for a message; empty if nothing is."""
    found = sorted(path.name for pattern in PICKLES for path in _visible(folder) if path.match(pattern))
    return f" (found {some_of(found)}, which is not read)" if found else ""


def _choose(folder: Path) -> Candidate:
    candidates: list[Candidate] = []
    for candidate in _candidates(folder):
        if not candidate.missing and _is_plain(candidate.path):
            return candidate
        candidates.append(candidate)
    complete = [candidate for candidate in candidates if not candidate.missing]
    if len(complete) == 1:
        return complete[0]
    if complete or not candidates:
        found = some_of(path.name for path in _visible(folder) if path.suffix == ".safetensors") or "none"
        raise fault(folder, f" needs one .safetensors file or a *.safetensors.index.json (found: {found})")
    index, _, missing = candidates[0]
    raise fault(folder, f" is missing {some_of(missing)}, named by {index.name}")


def _candidates(folder: Path) -> Iterator[Candidate]:
    """Plain ones first, of each kind indices before single files."""
    paths = sorted(_visible(folder), key=lambda path: (not _is_plain(path), path.suffix != ".json", path.name))
    for path in paths:
        if INDEX.fullmatch(path.name):
            yield _read_index(path)
        elif path.suffix == ".safetensors" and not SHARD.fullmatch(path.name):
            yield Candidate(path, None)


def _is_plain(path: Path) -> bool:
    return path.name.removesuffix(".index.json") in PLAIN


def _visible(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file()]


def _read_index(path: Path) -> Candidate:
    content: Any = decode(read_file(path), dict[str, Any], path, " is not a safetensors index (no weight_map)")
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise fault(path, " is not a safetensors index (no weight_map)")
    names = set(weight_map.values())
    if any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise fault(path, " names files that are not .safetensors files beside it")
    missing = tuple(sorted(name for name in names if not (path.parent / name).is_file()))
    return Candidate(path, {name: path.parent / file for name, file in weight_map.items()}, missing)


def _check_places(path: Path, tensors: dict[str, Tensor], num_bytes: int) -> None:
    """One tensor behind the other, up to the end of the file."""
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        begin, end = tensor.data_offsets
        width = FLOATS.get(tensor.dtype)
        if begin != position or end < begin or (width is not None and math.prod(tensor.shape) * width != end - begin):
            what = f"{name}: {tensor.dtype} {list(tensor.shape)}"
            raise _unreadable(path, f"{what} cannot lie at {begin} … {end}, the tensor before it ends at {position}")
        position = end
    if position != num_bytes:
        raise _unreadable(path, f"its header means {position:,} bytes of data, the file has {num_bytes:,}")


def _refuse_quantized(path: Path, header: dict[str, Tensor]) -> None:
    for name, tensor in header.items():
        if part := next((part for part in name.split(".") if part in QUANTIZED or "quant_state" in part), None):
            raise fault(path, f" holds quantized weights ({name}: {part}), which are not supported")
        if tensor.dtype not in FLOATS and not name.endswith(COUNTERS):
            raise fault(path, f" holds quantized weights ({name}: {tensor.dtype}), which are not supported")


def _unreadable(path: Path, text: str) -> Exception:
    return fault(path, f" cannot be read as safetensors: {text}")
