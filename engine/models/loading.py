"""Checkpoint weights: as one image in shared memory that all CPU workers map, or in a device's own memory.

Owns the way from a folder's safetensors files to named tensors: which file holds which tensor, conversion, fusing,
and the image that workers map. Knows no architecture: a *plan* says which tensors are wanted. Nothing is unpickled.

The image is an ordinary safetensors file (8 bytes of header length, JSON header, data), with every tensor placed at a
multiple of 64 bytes, so that kernels see the same alignment in every process.
"""

import json
import mmap
import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tetrion.engine.families.files import fault
from tetrion.engine.families.plan import Part, Plan, check_names, planned_shape
from tetrion.engine.families.weights import weight_map
from tetrion.engine.model_spec import CheckpointError
from tetrion.engine.models.finite import is_finite
from tetrion.engine.transport.available_memory import available_memory_bytes
from tetrion.engine.transport.segment import SharedMemoryError

ALIGNMENT = 64

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class TensorFiles(Protocol):
    """Where a component's tensors come from."""

    folder: Path

    @property
    def names(self) -> Iterable[str]: ...

    @property
    def identity(self) -> Hashable:
        """Equal to another's only if all tensors are."""

    def path(self, name: str) -> Path:
        """The file that holds a tensor."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises CheckpointError if there is no such tensor."""

    def read(self, name: str, device: torch.device) -> Tensor:
        """The tensor in its stored dtype, on `device`."""


class ComponentFiles:
    """The safetensors files of one component folder (`transformer/`, `vae/`, …): one file, or shards with an index."""

    def __init__(self, folder: Path) -> None:
        """Opens (maps) every file. Raises CheckpointError naming the file or tensor that is missing or damaged."""
        self.folder = folder
        self._path_of = weight_map(folder)
        self._opened = {path: _open_safetensors(path) for path in sorted(set(self._path_of.values()))}
        names_in = {path: set(file.keys()) for path, file in self._opened.items()}
        for name, path in self._path_of.items():
            if name not in names_in[path]:
                raise CheckpointError(f"model: {str(path)!r} has no tensor {name}, though its index says so")

    @property
    def names(self) -> Iterable[str]:
        return self._path_of.keys()

    @property
    def identity(self) -> Hashable:
        return frozenset((name, _identity(path)) for name, path in self._path_of.items())

    def path(self, name: str) -> Path:
        return self._path_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its file's header. Raises CheckpointError if there is no such tensor."""
        return tuple(self._file(name).get_slice(name).get_shape())

    def read(self, name: str, device: torch.device) -> Tensor:
        """The tensor in its stored dtype; on the CPU mapped from its file, elsewhere copied straight from there."""
        return self._file(name).get_tensor(name).to(device)

    def _file(self, name: str) -> safe_open:
        if name not in self._path_of:
            raise CheckpointError(f"model: {str(self.folder)!r} has no tensor {name}")
        return self._opened[self._path_of[name]]


def _identity(path: Path) -> str:
    """The file that links lead to. The hub's cache calls files by what is in them (`blobs/HASH`), so that equal ones of
    two models are known to be."""
    path = path.resolve()
    return path.name if path.parent.name == "blobs" else str(path)


def _open_safetensors(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"model: {str(path)!r} cannot be read as safetensors: {error}") from None


class Component(NamedTuple):
    """Files of one component and which of their tensors, under which names, are wanted."""

    files: TensorFiles
    plan: Plan

    @property
    def identity(self) -> Hashable:
        """Equal to another's only if both are loaded as the same tensors."""
        return self.files.identity, frozenset(self.plan.items())


def same_components(components: Mapping[str, Component]) -> dict[str, str]:
    """Each component that is loaded as the same tensors as one before it -> that one."""
    first: dict[Hashable, str] = {}
    firsts = {name: first.setdefault(component.identity, name) for name, component in components.items()}
    return {name: same for name, same in firsts.items() if same != name}


def planned_shapes(components: Mapping[str, Component]) -> dict[str, tuple[int, ...]]:
    """Shapes of all planned tensors, by `component/name`. Raises CheckpointError for missing or misshapen ones."""
    return {
        f"{component}/{name}": planned_shape(part, files.shape, files.folder)
        for component, (files, plan) in components.items()
        for name, part in plan.items()
    }


def load_to_device(components: Mapping[str, Component], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """All planned tensors in `dtype` in the device's memory, by `component/name`. Equal components share theirs.

    Converts and fuses there, one tensor at a time: host memory holds only the page cache. Raises CheckpointError for
    missing or misshapen tensors, before anything is allocated, and for values that are no numbers.
    """
    tensors: dict[str, Tensor] = {}
    numbers = _NumberCheck()
    shapes, same = planned_shapes(components), same_components(components)
    for component, (files, plan) in components.items():
        for name, part in plan.items():
            key = f"{component}/{name}"
            if component in same:
                tensors[key] = tensors[f"{same[component]}/{name}"]
                continue
            tensors[key] = torch.empty(shapes[key], dtype=dtype, device=device)
            _fill(tensors[key], files, part, numbers)
    numbers.finish()
    return tensors


def publish(fd: int, components: Mapping[str, Component]) -> int:
    """Write the planned tensors of all components as one safetensors image into the shared segment `fd`.

    Tensor names in the image are `component/name`. Converts and fuses on the way, one tensor at a time: the only full
    copy is the image; it holds equal components once, and says of which others they are. Returns its size in bytes.
    Raises CheckpointError for missing or misshapen tensors, before anything is written, and for values that are no
    numbers; SharedMemoryError if there is no room.
    """
    numbers, same = _NumberCheck(), same_components(components)
    components = {name: component for name, component in components.items() if name not in same}
    shapes = planned_shapes(components)
    header, offsets, num_bytes = _layout(shapes, same)
    _reserve(fd, num_bytes)
    with mmap.mmap(fd, num_bytes) as image:
        image[: len(header)] = header
        for component, (files, plan) in components.items():
            for name, part in plan.items():
                key = f"{component}/{name}"
                target = _view(image, shapes[key], len(header) + offsets[key])
                _fill(target, files, part, numbers)
                del target  # a view would keep the mapping from closing
    numbers.finish()
    return num_bytes


def attach(fd: int) -> dict[str, Tensor]:
    """Map an image that `publish` wrote: names -> fp32 tensors over shared pages, no copy.

    The mapping is copy-on-write: a stray write would stay in this process. It lives as long as any of its tensors.
    Raises CheckpointError if `fd` holds no such image.
    """
    num_bytes = os.fstat(fd).st_size
    try:
        image = mmap.mmap(fd, num_bytes, access=mmap.ACCESS_COPY)
        data_start = 8 + int.from_bytes(image[:8], "little")
        header = json.loads(image[8:data_start])
        same = header.pop("__metadata__", {})
        tensors = {
            name: _view(image, tuple(entry["shape"]), data_start + entry["data_offsets"][0])
            for name, entry in header.items()
            if entry["dtype"] == "F32"
        }
        for component, first in same.items():
            tensors |= {f"{component}/{name}": tensor for name, tensor in component_tensors(tensors, first).items()}
        return tensors
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"model: the shared weights segment holds no complete image: {error}") from None


def component_tensors(tensors: Mapping[str, Tensor], component: str) -> dict[str, Tensor]:
    """The tensors of one component, by their names within it."""
    prefix = f"{component}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def build_module(
    build: Callable[[], ModuleT],
    tensors: Mapping[str, Tensor],
    folder: Path,
    unused: tuple[str, ...] = (),
    beside: tuple[str, ...] = (),
) -> ModuleT:
    """A library module for inference whose parameters *are* the given tensors.

    `build` runs on the meta device, so nothing is allocated. Parameters whose names start with one of `unused` may be
    absent and stay on the meta device; tensors whose names start with one of `beside` are left out. Raises
    CheckpointError naming tensors that are missing, misshapen, or would be left out otherwise.
    """
    with torch.device("meta"):
        module = build()
    names = module.state_dict().keys()
    needed = {name for name in names if not name.startswith(unused)} if unused else names
    check_names(needed, tensors.keys(), folder, (*unused, *beside))
    try:
        module.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"model: {str(folder)!r}: {error}") from None
    return module.requires_grad_(False).eval()


class _NumberCheck:
    """Finds NaN and infinities among weights as they are loaded; the device is waited for once, at the end."""

    def __init__(self) -> None:
        self._checked: list[tuple[TensorFiles, str, Tensor]] = []

    def add(self, files: TensorFiles, name: str, values: Tensor) -> None:
        """`values`: of the checkpoint's tensor `name`, as loaded."""
        if values.numel():
            self._checked.append((files, name, is_finite(values)))

    def finish(self) -> None:
        """Raises CheckpointError naming a file and its tensor."""
        if not self._checked:
            return
        flags = torch.stack([flag for *_, flag in self._checked]).tolist()
        if bad := [(files, name) for (files, name, _), flag in zip(self._checked, flags, strict=True) if not flag]:
            files, name = bad[0]
            more = f"; so have {len(bad) - 1} more of the model's tensors" if len(bad) > 1 else ""
            raise fault(files.path(name), f": {name} has values that are no numbers (NaN or infinity){more}")


def _fill(target: Tensor, files: TensorFiles, part: Part, numbers: _NumberCheck) -> None:
    if part.rows is not None:
        (source,) = part.sources
        numbers.add(files, source, target.copy_(files.read(source, target.device)[slice(*part.rows)]))
        return
    if part.is_last_frame:
        (source,) = part.sources
        numbers.add(files, source, target.copy_(files.read(source, target.device)[:, :, -1]))
        return
    if part.rearranged is not None:
        split, order, _ = part.rearranged
        (source,) = part.sources
        ordered = files.read(source, target.device).reshape(split).permute(order)
        target.view(ordered.shape).copy_(ordered)
        numbers.add(files, source, target)
        return
    row = 0
    for source in part.sources:
        tensor = files.read(source, target.device)
        own = target if tensor.ndim == 0 else target[row : row + len(tensor)]
        numbers.add(files, source, own.copy_(tensor))
        row += len(own) if tensor.ndim else 0


def _layout(shapes: Mapping[str, tuple[int, ...]], same: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """Header bytes, data offset of each tensor, size of the whole image. `same`: what the header is to say of
    components that are not in it.

    safetensors allows no gaps, so filler tensors lie between those whose sizes are no multiples of the alignment.
    """
    entries: dict[str, dict[str, Any]] = {"__metadata__": dict(same)} if same else {}
    offsets: dict[str, int] = {}
    position = 0
    for name, shape in shapes.items():
        num_bytes = 4 * torch.Size(shape).numel()
        offsets[name] = position
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, position + num_bytes]}
        position += num_bytes
        if gap := -position % ALIGNMENT:
            filler = {"dtype": "U8", "shape": [gap], "data_offsets": [position, position + gap]}
            entries[f"__filler__{len(offsets)}"] = filler
            position += gap
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return header, offsets, len(header) + position


def _view(image: mmap.mmap, shape: tuple[int, ...], offset: int) -> Tensor:
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(shape)
    return torch.frombuffer(image, dtype=torch.float32, count=count, offset=offset).view(shape)


def _reserve(fd: int, num_bytes: int) -> None:
    """Size the segment and take its pages now: lack of memory is an error here, not a SIGBUS later."""
    available = available_memory_bytes()
    if available is not None and num_bytes - os.fstat(fd).st_size > available:
        raise SharedMemoryError("weights", num_bytes, available, "checked before reserving")
    try:
        os.ftruncate(fd, num_bytes)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, num_bytes)
    except OSError as error:
        raise SharedMemoryError("weights", num_bytes, available, error.strerror or str(error)) from error
