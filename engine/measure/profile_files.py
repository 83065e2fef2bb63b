"""Where measured cost tables lie, and which one an engine starts with: the one its config names, else one for its GPUs.

Owns the folders (the user's cache, then the installed `configs/profiles/`) and the files' names. Measures nothing.
"""

import importlib.resources
import logging
import os
import re
from pathlib import Path

from tetrion.engine.config import DeviceSpec, EngineConfig
from tetrion.engine.families.locate import expanded
from tetrion.engine.families.served import ServedModels
from tetrion.engine.hardware.gpus import visible_gpus
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.planning.cost.profile import Profile, read_profile

logger = logging.getLogger(__name__)
PACKAGE = "tetrion.configs.profiles"


def profile_file_name(gpu: str, model: str) -> str:
    """`nvidia-h100-80gb-hbm3-flux1-dev.json` for ("NVIDIA H100 80GB HBM3", "flux1-dev")."""
    return f"{_slug(gpu)}-{_slug(model)}.json"


def cache_folder() -> Path | None:
    """The user's own: what `tetrion profile` and the start-up measurement leave. None for a user without a home."""
    given = Path(os.environ.get("XDG_CACHE_HOME") or "")
    try:
        base = given if given.is_absolute() else Path.home() / ".cache"  # a relative one is to be ignored, says XDG
    except RuntimeError:
        return None
    return base / "tetrion" / "profiles"


def committed_folder() -> Path:
    return Path(str(importlib.resources.files(PACKAGE)))


def chosen_profiles(devices: tuple[DeviceSpec, ...], models: ServedModels, config: EngineConfig) -> dict[str, Profile]:
    """The measured table of each model that has one: that of `config.profiles`, else the user's or the committed one of
    these GPUs.

    Raises ValueError for a file that cannot be read or is of another model.
    """
    files = {models.names.get(name, name): expanded(file, "profiles") for name, file in config.profiles.items()}
    chosen = {
        name: _named_profile(files[name], spec) if name in files else _found_profile(devices, spec, config)
        for name, spec in models.specs.items()
    }
    return {name: profile for name, profile in chosen.items() if profile is not None}


def _found_profile(devices: tuple[DeviceSpec, ...], spec: ModelSpec, config: EngineConfig) -> Profile | None:
    gpu = single_gpu_name(devices)
    if gpu is None:
        return None
    cache = cache_folder() if config.profile_cache else None
    folders = (committed_folder(),) if cache is None else (cache, committed_folder())
    num_denoising = sum("denoise" in device.stages for device in devices)
    found = (profile_in(folder, gpu, spec, num_denoising) for folder in folders)
    return next((profile for profile in found if profile is not None), None)


def profile_in(folder: Path, gpu: str, spec: ModelSpec, num_devices: int) -> Profile | None:
    """The table in `folder` for these GPUs, if it knows every degree that `num_devices` allow and that shares the heads
    out evenly; others may be missing, and are not used then."""
    path = folder / profile_file_name(gpu, spec.name)
    if not os.path.isfile(path):  # unlike `Path.is_file` it says no where one may not look
        return None
    try:
        profile = read_profile(path)
    except OSError as error:
        logger.info("cost table not used: %s", error)
        return None
    known = {degree for cost in profile.classes.values() for degree in cost.step_ms}
    wanted = {degree for degree in spec.legal_degrees(num_devices) if spec.num_key_heads % degree == 0}
    return profile if profile.heads == spec.num_key_heads and known >= wanted else None


def single_gpu_name(devices: tuple[DeviceSpec, ...]) -> str | None:
    """The name that all devices share, if each is a GPU of its own."""
    if devices[0].kind != "cuda" or len({device.index for device in devices}) < len(devices):
        return None
    gpus = visible_gpus()
    names = {gpus[device.index] for device in devices if device.index < len(gpus)}
    return names.pop() if len(names) == 1 else None


def _named_profile(path: Path, spec: ModelSpec) -> Profile:
    try:
        profile = read_profile(path)
    except OSError as error:
        raise ValueError(f"profiles: cannot read {str(path)!r}: {error.strerror or error}") from None
    if profile.heads != spec.num_key_heads:
        raise ValueError(
            f"profiles: {str(path)!r} is of a model with {profile.heads} heads, {spec.name!r} has {spec.num_key_heads}"
        )
    return profile


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
