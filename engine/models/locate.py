"""Finds a checkpoint folder by path or by the name of an embedded model. No torch; reads no weights."""

import importlib.resources
from pathlib import Path

from tetrion.engine.model_spec import CheckpointError

EMBEDDED_PACKAGE = "tetrion.configs.models"


def resolve_model(name_or_path: str) -> Path:
    """The folder of an embedded model (`shapes`), else of a path. An embedded name wins over a folder of that name.

    Raises CheckpointError if it is neither; the folder's contents are not checked here.
    """
    embedded = embedded_models()
    if name_or_path in embedded:
        return embedded[name_or_path]
    path = Path(name_or_path).expanduser()
    if name_or_path and path.is_dir():
        return path
    known = ", ".join(sorted(embedded)) or "none"
    raise CheckpointError(f"model: {name_or_path!r} is neither a folder nor an embedded model (embedded: {known})")


def embedded_models() -> dict[str, Path]:
    """Name -> folder of every model that ships with the package."""
    root = Path(str(importlib.resources.files(EMBEDDED_PACKAGE)))
    return {folder.name: folder for folder in root.iterdir() if (folder / "model_index.json").is_file()}
