"""`manifest.jsonl`: what a batch has finished or failed, a line each, and thereby what a re-run may skip.

Owns the file. A line is appended whole with one write, after its picture is in place, so that an interrupted run leaves
at most pictures without a line (drawn again) and never a line without a picture.
"""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Literal

import msgspec

from tetrion.engine.request import Receipt
from tetrion.entrypoints.pictures import naming, replace_file

FILE_NAME = "manifest.jsonl"


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line. `file` is relative to the output folder; times in seconds. `latency_s`, `deliver_s` of it and `slo_met`
    are until the file was written. `error` is set exactly if it failed, `energy` (joules) exactly if it did not."""

    id: str | None
    line: int
    status: Literal["finished", "failed"]
    error: str | None = None
    file: str | None = None
    digest: str | None = None
    model: str | None = None
    prompt: str | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    num_steps: int | None = None
    latency_s: float | None = None
    deliver_s: float | None = None
    degrees: tuple[int, ...] | None = None
    slo_met: bool | None = None
    energy: Receipt | None = None


class Manifest:
    """Append-only while open; `finished` maps ids to the last finished entry of earlier runs."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE_NAME
        self._fd: int | None = None
        self.finished = _read_finished(self._path)

    def open(self, drop: Collection[str]) -> None:
        """Start this run: keep one line for each finished picture except those in `drop`, which are drawn again.

        Lines of failures are dropped too: they are tried, and reported, again.
        """
        kept = [entry for entry in self.finished.values() if entry.id not in drop]
        replace_file(self._path, b"".join(map(_encode, kept)))
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def append(self, entry: Entry) -> None:
        """Add one line, whole, at once."""
        if self._fd is None:
            raise ValueError("the manifest is not open")
        data = _encode(entry)
        with naming(self._path):
            while data:  # a regular file takes all of it in one write unless the disk is full
                data = data[os.write(self._fd, data) :]

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _encode(entry: Entry) -> bytes:
    return msgspec.json.encode(entry) + b"\n"


def _read_finished(path: Path) -> dict[str, Entry]:
    """Finished entries by id, the last one winning. A torn or foreign line is passed over: its picture is redone."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    decoder = msgspec.json.Decoder(Entry)
    finished: dict[str, Entry] = {}
    for line in data.splitlines():
        try:
            entry = decoder.decode(line)
        except msgspec.DecodeError:
            continue
        if entry.status == "finished" and entry.id is not None:
            finished[entry.id] = entry
    return finished
