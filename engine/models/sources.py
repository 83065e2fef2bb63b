"""Where a model's tensors come from: the files of a checkpoint's components, or random values of the same shapes.

Owns the choice by load format; knows no family.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from tetrion.engine.config import LoadFormat
from tetrion.engine.families.checkpoint import component_folder
from tetrion.engine.families.plan import Part
from tetrion.engine.models.dummy import DummyFiles
from tetrion.engine.models.loading import Component, ComponentFiles, TensorFiles

Shapes = Callable[[Path], dict[str, tuple[int, ...]]]
"""Component folder -> shapes of all tensors that its config means."""


def component_files(path: Path, load_format: LoadFormat, shapes: Mapping[str, Shapes]) -> dict[str, TensorFiles]:
    """The files of each component of the checkpoint `path`. Raises CheckpointError."""
    if load_format == "dummy":
        folders = {name: component_folder(path, name) for name in shapes}
        return {name: DummyFiles(path / name, shapes[name](folder)) for name, folder in folders.items()}
    return {name: ComponentFiles(component_folder(path, name)) for name in shapes}


def whole(files: TensorFiles, without: tuple[str, ...] = ()) -> Component:
    """All tensors under their own names, but those whose names begin with one of `without`."""
    return Component(files, {name: Part((name,)) for name in files.names if not name.startswith(without)})
