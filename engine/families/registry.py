"""Which family serves a checkpoint: one line a family. Modules are imported when they are first needed."""

import importlib
from pathlib import Path
from types import ModuleType

from tetrion.engine.config import LoadFormat
from tetrion.engine.errors import shown
from tetrion.engine.families.base import Family
from tetrion.engine.families.checkpoint import INDEX_FILE, pipeline_name
from tetrion.engine.families.files import fault
from tetrion.engine.model_spec import CheckpointError, ModelSpec

FAMILIES = {
    "FluxPipeline": "flux",
    "FluxKontextPipeline": "flux",
    "FluxFillPipeline": "flux",
    "StableDiffusion3Pipeline": "sd3",
    "ZImagePipeline": "zimage",
    "QwenImage21Pipeline": "qwenimage21",
    "Flux2KleinPipeline": "flux2",
    "Flux2Pipeline": "flux2",
    "Krea2Pipeline": "krea2",
    "QwenImagePipeline": "qwenimage",
}
"""Pipeline (`_class_name` in model_index.json) -> module in `families/`, and of the same name in `models/`."""


def read_model_spec(folder: Path, load_format: LoadFormat = "safetensors") -> ModelSpec:
    """Read and check a checkpoint folder; with `dummy` it needs neither weights nor tokenizers.

    Raises CheckpointError naming the first thing that is missing or not supported.
    """
    try:
        pipeline = pipeline_name(folder)
        if not isinstance(pipeline, str) or pipeline not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise fault(folder / INDEX_FILE, f": architecture {shown(pipeline)} is not supported (supported: {known})")
        return family_of(FAMILIES[pipeline]).read(folder, load_format)
    except OSError as error:
        raise CheckpointError(f"model: {error.filename or str(folder)!r}: {error.strerror or error}") from error


def family_of(name: str) -> Family:
    """The family's engine side."""
    family: Family = importlib.import_module(f"tetrion.engine.families.{name}").FAMILY
    return family


def worker_module(name: str) -> ModuleType:
    """The family's worker side. Imports torch."""
    return importlib.import_module(f"tetrion.engine.models.{name}")
