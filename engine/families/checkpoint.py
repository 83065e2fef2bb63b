"""Checkpoint folders in diffusers layout, as families read them: JSON as typed values, presets, what is missing.

A checkpoint is a folder with `model_index.json` and one folder per component. An optional `preset.json` gives sizes,
steps and text length, and components that the model shares with another one. No torch, no weights.
"""

import importlib.resources
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import msgspec

from tetrion.engine.config import LoadFormat
from tetrion.engine.model_spec import CheckpointError, SchedulerSpec

EMBEDDED_PACKAGE = "tetrion.configs.models"
INDEX_FILE = "model_index.json"
PRESET_FILE = "preset.json"
SCHEDULER_FILE = "scheduler/scheduler_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
UNSUPPORTED_OPTIONS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
)
"""Of the scheduler."""

_T = TypeVar("_T")


class Preset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Defaults and limits of a model; the values here are FLUX.1-dev's. Sizes in pixels.

    `components_from`: component -> "model/component", where another embedded model's is used.
    """

    name: str = ""
    num_steps: int = 28
    guidance: float | None = 3.5
    max_text_tokens: int = 512
    min_size: int = 128
    max_size: int = 2048
    default_width: int = 1024
    default_height: int = 1024
    components_from: dict[str, str] = {}


def embedded_folder() -> Path:
    """Where the models lie that ship with the package."""
    return Path(str(importlib.resources.files(EMBEDDED_PACKAGE)))


def pipeline_name(folder: Path) -> object:
    """What `model_index.json` calls the pipeline. Raises CheckpointError if there is no such file."""
    if not folder.is_dir():
        raise CheckpointError(f"model: {str(folder)!r} is not a folder")
    if not (folder / INDEX_FILE).is_file():
        raise CheckpointError(f"model: {str(folder)!r} is missing {INDEX_FILE}")
    return read_json(folder, INDEX_FILE).get("_class_name")


def component_folder(folder: Path, component: str) -> Path:
    """Where a component of the checkpoint lies: in it, or in the embedded model that its preset names.

    Raises CheckpointError for a preset that cannot be read or names none.
    """
    source = read_preset(folder, Preset()).components_from.get(component)
    if source is None:
        return folder / component
    path = embedded_folder() / source
    if len(PurePosixPath(source).parts) != 2 or ".." in source or not path.is_dir():
        raise CheckpointError(
            f"model: {str(folder / PRESET_FILE)!r}: components_from: {component}: expected"
            f' "model/component" of an embedded model, got {source!r}'
        )
    return path


def component_file(folder: Path, name: str) -> Path:
    """Where a file of a component lies; `name`: "component/file"."""
    component, _, file = name.partition("/")
    return component_folder(folder, component) / file


def read_preset(folder: Path, default: Preset) -> Preset:
    """The folder's preset file, or `default`."""
    try:
        return msgspec.json.decode((folder / PRESET_FILE).read_bytes(), type=Preset)
    except FileNotFoundError:
        return default
    except msgspec.DecodeError as error:
        raise CheckpointError(f"model: {str(folder / PRESET_FILE)!r}: {error}") from None


def model_name(folder: Path, preset: Preset) -> str:
    """The preset's, else the folder's, or in the hub's cache (`models--OWNER--NAME/snapshots/REVISION`) the model's."""
    if preset.name:
        return preset.name
    path = folder.resolve()
    repository = path.parent.parent.name
    return repository.rpartition("--")[2] if repository.startswith("models--") else path.name


def check_complete(
    folder: Path,
    load_format: LoadFormat,
    *,
    configs: Sequence[str],
    tokenizers: Sequence[str],
    with_weights: Sequence[str],
) -> None:
    """Raises CheckpointError naming all that is missing. `configs`: files; `tokenizers` and `with_weights`: components,
    which `dummy` does not need."""
    missing = [name for name in configs if not component_file(folder, name).is_file()]
    if load_format != "dummy":
        missing += _missing_weights(folder, tokenizers, with_weights, hint=not missing)
    if missing:
        raise CheckpointError(f"model: {str(folder)!r} is missing {', '.join(missing)}")


def _missing_weights(folder: Path, tokenizers: Sequence[str], with_weights: Sequence[str], hint: bool) -> list[str]:
    missing = [f"{name}/{TOKENIZER_CONFIG}" for name in tokenizers if not has_tokenizer(component_folder(folder, name))]
    weights = [
        f"{part}/*.safetensors"
        for part in with_weights
        if not any(component_folder(folder, part).glob("*.safetensors"))
    ]
    if hint and len(weights) == len(with_weights):
        weights[-1] += " (it holds configs only: load_format dummy draws random weights)"
    return missing + weights


def has_tokenizer(folder: Path) -> bool:
    """Whether a component folder holds a tokenizer."""
    return (folder / TOKENIZER_CONFIG).is_file()


def read_config(folder: Path, name: str, config_type: type[_T], class_name: str) -> _T:
    """A component's config ("component/file") as a value. Raises CheckpointError if it is of another class, has no
    such field or one of another type."""
    config = read_json(folder, name)
    if config.get("_class_name") != class_name:
        component = name.partition("/")[0]
        raise CheckpointError(f"model: {component} {config.get('_class_name')!r} is not supported")
    return _convert(folder, name, config, config_type)


def read_scheduler(folder: Path) -> SchedulerSpec:
    """Raises CheckpointError for another scheduler than FlowMatchEuler's, or for options that are not supported."""
    config = read_json(folder, SCHEDULER_FILE)
    if config.get("_class_name") != "FlowMatchEulerDiscreteScheduler":
        raise CheckpointError(
            f"model: scheduler {config.get('_class_name')!r} is not supported"
            " (supported: FlowMatchEulerDiscreteScheduler)"
        )
    for option in UNSUPPORTED_OPTIONS:
        if config.get(option):
            raise CheckpointError(f"model: scheduler option {option} is not supported")
    return _convert(folder, SCHEDULER_FILE, config, SchedulerSpec)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the checkpoint; `name`: of a file in its folder, or "component/file"."""
    path = component_file(folder, name) if "/" in name else folder / name
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise CheckpointError(f"model: {str(path)!r} is not a JSON object: {error}") from None


def _convert(folder: Path, name: str, config: dict[str, Any], config_type: type[_T]) -> _T:
    try:
        return msgspec.convert(config, config_type)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"model: {str(folder)!r}: {name}: {error}") from None
