"""Where a measurement's record comes from and goes to: commit, command line, JSON file."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from tetrion.engine.gpu_facts import gpu_facts
from tetrion.engine.machine import describe_host


def make_record(command: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """`{"host", "commit", "command", "rows"}`, the form of every file in `benchmarks/results/`."""
    return {"host": host_facts(), "commit": commit(), "command": command, "rows": rows}


def host_facts() -> dict[str, Any]:
    """`describe_host`, and `gpus` where there are some."""
    gpus = gpu_facts()
    return describe_host() | ({"gpus": gpus} if gpus else {})


def write_record(record: dict[str, Any], output: Path | None) -> str:
    """The record as JSON text, written to `output` too if one is given: the whole of it or nothing."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    if output is not None:
        write_whole(output, text.encode() + b"\n")
    return text


def write_whole(path: Path, data: bytes) -> None:
    """A file with `data`, or what was there before: never a part of it. Makes its folder, so that no measurement is
    lost for want of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def commit() -> str | None:
    """TETRION_COMMIT, else what git says; None where neither knows."""
    if named := os.environ.get("TETRION_COMMIT"):
        return named
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
