"""Writes the model folder (diffusers layout, float16 shards, loads as float32) and checks its size limits."""

import copy
import json
from pathlib import Path

import torch
from diffusers import FluxPipeline

from benchmarks.embedded_model.architecture import PRESET, Components

MAX_SHARD_BYTES = 15 * 2**20
MAX_FOLDER_BYTES = 32 * 2**20


def export(components: Components, folder: Path, preset: dict = PRESET) -> None:
    """Write every component under `folder`; ValueError when a file or the folder is over its limit."""
    half = {name: copy.deepcopy(module).cpu().half() for name, module in components.modules().items()}
    pipeline = FluxPipeline(
        scheduler=components.scheduler,
        tokenizer=components.tokenizer,
        tokenizer_2=components.tokenizer_2,
        **half,
    )
    pipeline.save_pretrained(folder, safe_serialization=True, max_shard_size="14MB")
    for name in ("text_encoder", "text_encoder_2"):
        _declare_float32(folder / name / "config.json")
    for name in ("transformer", "vae"):
        _forget_origin(folder / name / "config.json")
    (folder / "preset.json").write_text(json.dumps(preset, indent=2) + "\n")
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)
    check_sizes(folder)


def _declare_float32(path: Path) -> None:
    """transformers loads in the dtype that config.json names, diffusers in float32 unless told otherwise."""
    config = json.loads(path.read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _forget_origin(path: Path) -> None:
    """diffusers notes the folder that weights were loaded from, which is of no use elsewhere."""
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)
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


def load(folder: Path, device: str | torch.device = "cpu") -> Components:
    """The folder's components in float32."""
    pipeline = FluxPipeline.from_pretrained(folder).to(device)
    names = Components.__dataclass_fields__
    return Components(**{name: getattr(pipeline, name) for name in names})
