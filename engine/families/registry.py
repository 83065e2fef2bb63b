"""Which family serves a checkpoint: one line a family. Modules are imported when they are first needed."""

import importlib
from pathlib import Path
from types import ModuleType

from tetrion.engine.config import LoadFormat
from tetrion.engine.families.base import Family
from tetrion.engine.families.checkpoint import pipeline_name
from tetrion.engine.model_spec import CheckpointError, ModelSpec

FAMILIES = {
    "FluxPipeline": "flux",
    "StableDiffusion3Pipeline": "sd3",
}
"""Pipeline (`_class_name` in model_index.json) -> module in `families/`, and of the same name in `models/`."""


def read_model_spec(folder: Path, load_format: LoadFormat = "safetensors") -> ModelSpec:
    """Read and check a checkpoint folder; with `dummy` it needs neither weights nor tokenizers.

    Raises CheckpointError naming the first thing that is missing or not supported.
    """
    pipeline = pipeline_name(folder)
    if pipeline not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise CheckpointError(f"model: architecture {pipeline!r} is not supported (supported: {known})")
    return family_of(FAMILIES[pipeline]).read(folder, load_format)


def family_of(name: str) -> Family:
    """The family's engine side."""
    family: Family = importlib.import_module(f"tetrion.engine.families.{name}").FAMILY
    return family


def worker_module(name: str) -> ModuleType:
    """The family's worker side. Imports torch."""
    return importlib.import_module(f"tetrion.engine.models.{name}")
