"""Copies of the embedded models that tests may damage, without torch."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from tetrion.engine.families.checkpoint import embedded_folder
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.model_spec import CheckpointError, ModelSpec

Header = dict[str, Any]


def copied(name: str, folder: Path) -> Path:
    """A copy of an embedded model whose components are all its own."""
    source = embedded_folder() / name
    shutil.copytree(source, folder)
    preset = json.loads((folder / "preset.json").read_bytes())
    for component, other in preset.pop("components_from", {}).items():
        shutil.copytree(embedded_folder() / other, folder / component)
    (folder / "preset.json").write_bytes(msgspec.json.encode(preset))
    return folder


def change(folder: Path, name: str, /, **fields: Any) -> None:
    """Fields of a JSON file."""
    path = folder / name
    path.write_bytes(msgspec.json.encode(json.loads(path.read_bytes()) | fields))


def remove(folder: Path, name: str, *fields: str) -> None:
    path = folder / name
    content = json.loads(path.read_bytes())
    path.write_bytes(msgspec.json.encode({key: value for key, value in content.items() if key not in fields}))


def rewrite(path: Path, edit: Callable[[Header], object]) -> None:
    """A safetensors file with another header; its data stays."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def refusal(folder: Path) -> str:
    """What is said of a checkpoint that is refused: one line."""
    try:
        read_model_spec(folder)
    except CheckpointError as error:
        text = str(error)
        assert text.isprintable() and text.startswith("model: ") and len(text) <= 1000
        return text
    raise AssertionError("it is taken")


def taken(folder: Path) -> ModelSpec:
    return read_model_spec(folder)
