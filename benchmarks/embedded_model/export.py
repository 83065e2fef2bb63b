"""Writes a model folder (diffusers layout, float16 shards, loads as float32), checks its size limits, and reads it.

A folder may lack components that another embedded model has: its preset names them under `components_from`.
"""

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import nn

MODELS_FOLDER = Path(__file__).parents[2] / "configs/models"
MAX_SHARD_BYTES = 15 * 2**20
MAX_FOLDER_BYTES = 32 * 2**20


def modules(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The components that have weights, by folder name."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def with_components(pipeline: DiffusionPipeline, **changed: Any) -> DiffusionPipeline:
    """The pipeline with some components changed; the others are shared."""
    return type(pipeline)(**{**pipeline.components, **changed})


def export(pipeline: DiffusionPipeline, folder: Path, preset: Mapping[str, Any]) -> None:
    """Write the components that are not borrowed; ValueError when a file or the folder is over its limit."""
    borrowed = preset.get("components_from", {})
    half = {name: copy.deepcopy(module).cpu().half() for name, module in modules(pipeline).items()}
    with_components(pipeline, **half).save_pretrained(folder, safe_serialization=True, max_shard_size="14MB")
    for name in borrowed:
        shutil.rmtree(folder / name)
    for path in folder.glob("*/config.json"):
        _tidy_config(path)
    write_preset(folder, preset)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)
    check_sizes(folder)


def _tidy_config(path: Path) -> None:
    """transformers loads in the dtype that config.json names, diffusers in float32 unless told otherwise.

    The latter also notes the folder that weights were loaded from, which is of no use elsewhere.
    """
    config = json.loads(path.read_text())
    config.pop("torch_dtype", None)
    config.pop("_name_or_path", None)
    if "architectures" in config:
        config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def check_sizes(folder: Path) -> int:
    """Bytes of the folder; ValueError with the numbers if a shard exceeds 15 MiB or the whole 32 MiB."""
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    for path, num_bytes in sizes.items():
        if num_bytes > MAX_SHARD_BYTES:
            raise ValueError(f"{path}: {num_bytes} bytes, limit {MAX_SHARD_BYTES}")
    total = sum(sizes.values())
    if total > MAX_FOLDER_BYTES:
        raise ValueError(f"{folder}: {total} bytes, limit {MAX_FOLDER_BYTES}")
    return total


def read_preset(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "preset.json").read_text())


def write_preset(folder: Path, preset: Mapping[str, Any]) -> None:
    (folder / "preset.json").write_text(json.dumps(preset, indent=2) + "\n")


def borrowed_components(preset: Mapping[str, Any]) -> dict[str, Any]:
    """The components that the preset takes from other embedded models (`model/component`), in float32."""
    loaded = {}
    for name, place in preset.get("components_from", {}).items():
        model, component = place.split("/")
        index = json.loads((MODELS_FOLDER / model / "model_index.json").read_text())
        library, class_name = index[component]
        cls = getattr({"diffusers": diffusers, "transformers": transformers}[library], class_name)
        loaded[name] = cls.from_pretrained(MODELS_FOLDER / model / component)
    return loaded


def load(folder: Path, device: str | torch.device = "cpu") -> DiffusionPipeline:
    """The folder's pipeline in float32, with what it borrows."""
    return DiffusionPipeline.from_pretrained(folder, **borrowed_components(read_preset(folder))).to(device)
