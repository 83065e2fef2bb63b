"""Finds a checkpoint folder by path, by the name of an embedded model or by an id on the Hugging Face hub, of a
revision or of the newest one. No torch; reads no weights."""

import functools
import os
import re
from pathlib import Path

from tetrion.engine.errors import shown
from tetrion.engine.families.checkpoint import INDEX_FILE, PRESET_FILE, embedded_folder
from tetrion.engine.families.weights import has_weights
from tetrion.engine.model_spec import CheckpointError

HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(.*))?", re.DOTALL)
REVISION = re.compile(r"(?!.*(\.\.|//))[A-Za-z0-9_][\w./+-]{0,254}")
"""Branches, tags and commits. What git allows beside these no name on the hub has."""
HUB_FILES = (
    INDEX_FILE,
    PRESET_FILE,
    "scheduler/*.json",
    *(f"tokenizer*/*.{kind}" for kind in ("json", "txt", "model", "jinja")),
    *(f"{part}/*.{kind}" for part in ("transformer", "vae", "text_encoder*") for kind in ("json", "safetensors")),
)
"""What is downloaded: the diffusers layout of any family, weights as safetensors, nothing that is run: a chat template
(jinja) is only looked at."""
HUB_FILES_TWICE = ("*.fp16.*", "*.fp16-*")
"""Of those, what mostly is there a second time in fp16."""


def resolve_model(name_or_path: str) -> Path:
    """The folder of an embedded model (`shapes`), else of a path, else of an `owner/name` or `owner/name@revision` on
    the hub, which is downloaded to the hub's cache if it is not there. An embedded name wins over a folder of that
    name, a folder over the hub. `revision`: a branch, tag or commit.

    Raises CheckpointError if it is none of them; the folder's contents are not checked here.
    """
    embedded = embedded_models()
    if name_or_path in embedded:
        return embedded[name_or_path]
    if name_or_path and (path := expanded(name_or_path, "model")) and _is_folder(path):
        return path
    known = ", ".join(sorted(embedded)) or "none"
    neither = f"model: {shown(name_or_path)} is neither a folder nor an embedded model (embedded: {known})"
    if (hub_id := HUB_ID.fullmatch(name_or_path)) is None:
        raise CheckpointError(neither)
    name, revision = hub_id.groups()
    if revision is not None and not REVISION.fullmatch(revision):
        raise CheckpointError(f"{neither}, and {shown(revision)} cannot be a revision: a branch, tag or commit")
    return _from_hub(name, revision, neither)


def hub_revision(name_or_path: str) -> str | None:
    """The revision that is asked of the hub by `owner/name@revision`; None of anything else."""
    hub_id = HUB_ID.fullmatch(name_or_path)
    is_found_here = name_or_path in embedded_models() or _is_folder(expanded(name_or_path, "model"))
    return None if hub_id is None or is_found_here else hub_id[2]


def expanded(path: str, field: str) -> Path:
    """With a user's home in place of `~` or `~user`. Raises CheckpointError, a ValueError, if there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise CheckpointError(f"{field}: {path!r} is in a home that does not exist") from None


def embedded_models() -> dict[str, Path]:
    """Name -> folder of every model that ships with the package."""
    return {folder.name: folder for folder in embedded_folder().iterdir() if (folder / INDEX_FILE).is_file()}


def _is_folder(path: Path) -> bool:
    """Also says no of a name that no file can have, or where one may not look."""
    return os.path.isdir(path)


def _from_hub(hub_id: str, revision: str | None, neither: str) -> Path:
    from huggingface_hub import snapshot_download  # takes a while to import
    from huggingface_hub.errors import HfHubHTTPError

    try:
        download = functools.partial(snapshot_download, hub_id, revision=revision, allow_patterns=list(HUB_FILES))
        folder = download(ignore_patterns=list(HUB_FILES_TWICE))
        if not all(has_weights(config.parent) for config in Path(folder).glob("*/config.json")):
            folder = download()  # it may have them in fp16 alone
        return Path(folder)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"{neither}, and the Hugging Face hub does not give it: {reason}") from None
