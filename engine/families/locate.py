"""Finds a checkpoint folder by path, by the name of an embedded model or by an id on the Hugging Face hub. No torch;
reads no weights."""

import re
from pathlib import Path

from tetrion.engine.families.checkpoint import INDEX_FILE, PRESET_FILE, embedded_folder
from tetrion.engine.families.weights import has_weights
from tetrion.engine.model_spec import CheckpointError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = (
    INDEX_FILE,
    PRESET_FILE,
    "scheduler/*.json",
    *(f"tokenizer*/*.{kind}" for kind in ("json", "txt", "model")),
    *(f"{part}/*.{kind}" for part in ("transformer", "vae", "text_encoder*") for kind in ("json", "safetensors")),
)
"""What is downloaded: the diffusers layout of any family, weights as safetensors, nothing that could run."""
HUB_FILES_TWICE = ("*.fp16.*", "*.fp16-*")
"""Of those, what mostly is there a second time in fp16."""


def resolve_model(name_or_path: str) -> Path:
    """The folder of an embedded model (`shapes`), else of a path, else of an `owner/name` on the hub, which is
    downloaded to the hub's cache if it is not there. An embedded name wins over a folder of that name.

    Raises CheckpointError if it is none of them; the folder's contents are not checked here.
    """
    embedded = embedded_models()
    if name_or_path in embedded:
        return embedded[name_or_path]
    path = expanded(name_or_path, "model")
    if name_or_path and path.is_dir():
        return path
    known = ", ".join(sorted(embedded)) or "none"
    neither = f"model: {name_or_path!r} is neither a folder nor an embedded model (embedded: {known})"
    if not HUB_ID.fullmatch(name_or_path):
        raise CheckpointError(neither)
    return _from_hub(name_or_path, neither)


def expanded(path: str, field: str) -> Path:
    """With a user's home in place of `~` or `~user`. Raises CheckpointError, a ValueError, if there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise CheckpointError(f"{field}: {path!r} is in a home that does not exist") from None


def embedded_models() -> dict[str, Path]:
    """Name -> folder of every model that ships with the package."""
    return {folder.name: folder for folder in embedded_folder().iterdir() if (folder / INDEX_FILE).is_file()}


def _from_hub(hub_id: str, neither: str) -> Path:
    from huggingface_hub import snapshot_download  # takes a while to import
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = snapshot_download(hub_id, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_FILES_TWICE))
        if not all(has_weights(config.parent) for config in Path(folder).glob("*/config.json")):
            folder = snapshot_download(hub_id, allow_patterns=list(HUB_FILES))  # it may have them in fp16 alone
        return Path(folder)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"{neither}, and the Hugging Face hub does not give it: {reason}") from None
