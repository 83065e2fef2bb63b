"""Where a measurement's record comes from and goes to: commit, command line, JSON file."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tetrion.engine.hardware.host import describe_host
from tetrion.engine.hardware.nvml import gpu_facts
from tetrion.entrypoints.errors import InputError


def make_record(command: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """`{"host", "commit", "command", "rows"}`, the form of every file in `benchmarks/results/`."""
    return {"host": host_facts(), "commit": commit(), "command": command, "rows": rows}


def host_facts() -> dict[str, Any]:
    """`describe_host`, and `gpus` where there are some."""
    gpus = gpu_facts()
    return describe_host() | ({"gpus": gpus} if gpus else {})


def as_text(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=1, ensure_ascii=False)


def write_record(record: dict[str, Any], output: Path | None) -> str:
    """The record as JSON text, written to `output` too if one is given: the whole of it or nothing."""
    text = as_text(record)
    if output is not None:
        write_whole(output, text.encode() + b"\n")
    return text


def write_whole(path: Path, data: bytes) -> None:
    """A file with `data`, or what was there before: never a part of it."""
    with whole(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path`, with the same ending, to write a file under; it becomes `path` at the end, and is removed
    if anything fails. Makes the folder, so that no measurement is lost for want of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.tmp.{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path | None, field: str) -> None:
    """Raises InputError for a name that no file can be written under. To be asked before anything is measured. None: no
    file is asked for."""
    if path is None:
        return
    if path.exists() and not path.is_file():
        raise InputError(f"{field}: {path} is there and is not a file")
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{field}: cannot write {path}: {folder} is not a folder that can be written to")


def commit() -> str | None:
    """TETRION_COMMIT, else what git says; None where neither knows."""
    if named := os.environ.get("TETRION_COMMIT"):
        return named
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
