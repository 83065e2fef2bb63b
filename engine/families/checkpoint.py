"""Checkpoint folders in diffusers layout, as families read them: JSON as typed values, presets, what is missing.

A checkpoint is a folder with `model_index.json` and one folder per component. An optional `preset.json` gives sizes,
steps and text length, and components that the model shares with another one. No torch, no weights.
"""

import importlib.resources
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from tetrion.engine.config import LoadFormat
from tetrion.engine.errors import shown
from tetrion.engine.families.components import convert, refuse_quantization
from tetrion.engine.families.files import decode, fault, read_file, read_object
from tetrion.engine.families.tokenizers import TokenizerKind, missing_files
from tetrion.engine.families.weights import describe_files, has_weights
from tetrion.engine.model_spec import CheckpointError, SchedulerSpec, Sizes

EMBEDDED_PACKAGE = "tetrion.configs.models"
INDEX_FILE = "model_index.json"
PRESET_FILE = "preset.json"
SCHEDULER_FILE = "scheduler/scheduler_config.json"
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
LIBRARIES = ("diffusers", "transformers")
"""Whose classes a pipeline's components are; code of a checkpoint's own is not run."""
UNSUPPORTED_OPTIONS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)
"""Of the scheduler. What else a config may say of it changes nothing in diffusers either."""
MAX_SHIFT = 80.0
"""Its exponential is about what fp32 holds."""
_Steps = Annotated[int, Meta(ge=1, le=1000)]
_Pixels = Annotated[int, Meta(ge=1, le=65536)]


class Preset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Defaults and limits of a model; the values here are FLUX.1-dev's. Sizes in pixels.

    `components_from`: component -> "model/component", where another embedded model's is used.
    """

    name: Annotated[str, Meta(max_length=200)] = ""
    num_steps: _Steps = 28
    guidance: Annotated[float, Meta(ge=0, le=1000)] | None = 3.5
    max_text_tokens: Annotated[int, Meta(ge=1, le=4096)] = 512
    min_size: _Pixels = 128
    max_size: _Pixels = 2048
    default_width: _Pixels = 1024
    default_height: _Pixels = 1024
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
    return read_object(folder / INDEX_FILE).get("_class_name")


def check_classes(folder: Path, classes: Mapping[str, Sequence[str]]) -> None:
    """Raises CheckpointError for a component that `model_index.json` says is of another class, or for which it has
    none. What it does not name its own config tells. `classes`: component -> what it may be, the usual one first."""
    index = read_object(folder / INDEX_FILE)
    refuse_quantization(folder / INDEX_FILE, index)
    for component, names in classes.items():
        entry = index.get(component, ["", names[0]])
        is_pair = isinstance(entry, list) and len(entry) == 2
        if not is_pair or entry[1] not in names or entry[0] not in ("", *LIBRARIES):
            raise fault(
                folder / INDEX_FILE, f": {component}: {shown(entry)} is not supported (its class must be {names[0]})"
            )


def has_component(folder: Path, component: str) -> bool:
    """Whether `model_index.json` names a class for it. Raises CheckpointError."""
    entry = read_object(folder / INDEX_FILE).get(component)
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def names_component(folder: Path, component: str) -> bool:
    """Whether `model_index.json` says anything of it, be it that there is none. Raises CheckpointError."""
    return component in read_object(folder / INDEX_FILE)


def component_folder(folder: Path, component: str) -> Path:
    """Where a component of the checkpoint lies: in it, or in the embedded model that its preset names.

    Raises CheckpointError for a preset that cannot be read or names none.
    """
    source = read_preset(folder, Preset()).components_from.get(component)
    if source is None:
        return folder / component
    path, parts = embedded_folder() / source, PurePosixPath(source).parts
    if len(parts) != 2 or not {"/", ".."}.isdisjoint(parts) or not path.is_dir():
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
    """The folder's preset file, or `default`. Raises CheckpointError."""
    path = folder / PRESET_FILE
    if not os.path.lexists(path):
        return default
    preset = decode(read_file(path), Preset, path, "")
    if not preset.name.isprintable():
        raise fault(path, f": name: must be printable, got {shown(preset.name)}")
    return preset


def check_sizes(folder: Path, sizes: Sizes) -> Sizes:
    """Raises CheckpointError if the preset's default is no size that is drawn."""
    if sizes.min > sizes.max or not all(map(sizes.accept, sizes.default)):
        raise fault(
            folder / PRESET_FILE,
            f": default_width and default_height {list(sizes.default)} must be multiples of {sizes.multiple} from"
            f" min_size {sizes.min} to max_size {sizes.max}",
        )
    return sizes


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
    tokenizers: Mapping[str, TokenizerKind],
    with_weights: Sequence[str],
) -> None:
    """Raises CheckpointError naming all that is missing. `configs`: files; `tokenizers` and `with_weights`: components,
    which `dummy` does not need."""
    missing = [name for name in configs if not component_file(folder, name).is_file()]
    if load_format != "dummy":
        missing += _missing_weights(folder, tokenizers, with_weights, hint=not missing)
    if missing:
        raise CheckpointError(f"model: {str(folder)!r} is missing {', '.join(missing)}")


def _missing_weights(
    folder: Path, tokenizers: Mapping[str, TokenizerKind], with_weights: Sequence[str], hint: bool
) -> list[str]:
    missing = [
        f"{name}/{file}"
        for name, kind in tokenizers.items()
        for file in missing_files(component_folder(folder, name), kind)
    ]
    weights = [
        f"{part}/*.safetensors{describe_files(component_folder(folder, part))}"
        for part in with_weights
        if not has_weights(component_folder(folder, part))
    ]
    if hint and len(weights) == len(with_weights):
        weights[-1] += " (it holds configs only: load_format dummy draws random weights)"
    return missing + weights


def read_scheduler(folder: Path) -> SchedulerSpec:
    """Raises CheckpointError for another scheduler than FlowMatchEuler's, or for options that are not supported."""
    path = component_file(folder, SCHEDULER_FILE)
    config = read_object(path)
    if (found := config.get("_class_name")) != SCHEDULER:
        raise fault(path, f": _class_name: scheduler {shown(found)} is not supported (supported: {SCHEDULER})")
    for option in UNSUPPORTED_OPTIONS:
        if config.get(option):
            raise fault(path, f": scheduler option {option} is not supported")
    return convert(path, {name: value for name, value in config.items() if value is not None}, SchedulerSpec)


def check_shifts(folder: Path, scheduler: SchedulerSpec, sizes: Sizes) -> None:
    """Raises CheckpointError if the noise levels of a picture cannot be computed for all sizes."""
    if not scheduler.use_dynamic_shifting:
        return
    path, first, last = (
        component_file(folder, SCHEDULER_FILE),
        scheduler.base_image_seq_len,
        scheduler.max_image_seq_len,
    )
    if first == last:
        raise fault(path, f": base_image_seq_len and max_image_seq_len must differ, got {first} and {last}")
    slope = (scheduler.max_shift - scheduler.base_shift) / (last - first)
    for rows in (sizes.num_rows(sizes.min, sizes.min), sizes.num_rows(sizes.max, sizes.max)):
        shift = scheduler.base_shift + slope * (rows - first)
        least = 0.0 if scheduler.time_shift_type == "linear" else -MAX_SHIFT
        if not least < shift <= MAX_SHIFT:
            raise fault(
                path,
                f": base_shift {scheduler.base_shift:g} and max_shift {scheduler.max_shift:g} make a shift of {shift:g}"
                f" of {rows} rows, which must be between {least:g} and {MAX_SHIFT:g}",
            )


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the checkpoint; `name`: of a file in its folder, or "component/file". Raises CheckpointError."""
    return read_object(component_file(folder, name) if "/" in name else folder / name)
