"""Damaged lines of `tetrion batch`, all in one file, good ones among them.

Each line must be drawn or named in the manifest, good ones with the same pixels wherever they stand; nothing may be
written beside the output folder; exit code 0 or 1, no traceback.
"""

import json
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from PIL import Image

from benchmarks.serving import TETRION
from benchmarks.soak.mutation import line_case
from benchmarks.soak.report import Check, Row, none_of

GOOD_EVERY = 50
GOOD = {"prompt": "a small red circle", "size": "128x128", "seed": 7, "num_steps": 1}
START_S, EACH_S = 120.0, 0.5
"""A batch has so long, and so long for each line, before it counts as hung."""
MANIFEST = "manifest.jsonl"


def write_lines(path: Path, seed: int, numbers: range) -> list[str]:
    """Writes the file, which begins with a good line. Returns the ids of good ones."""
    ids, lines = list[str](), list[bytes]()
    for place, number in enumerate(numbers):
        if place % GOOD_EVERY == 0:
            ids.append(f"good-{place}")
            lines.append(json.dumps(GOOD | {"id": ids[-1]}).encode())
        lines.append(line_case(GOOD, seed, number))
    path.write_bytes(b"\n".join(lines) + b"\n")
    return ids


def fuzz_lines(seed: int, numbers: range) -> tuple[Row, list[Check]]:
    with tempfile.TemporaryDirectory(prefix="tetrion-soak-") as folder:
        requests, output = Path(folder, "requests.jsonl"), Path(folder, "out")
        ids = write_lines(requests, seed, numbers)
        line = (*TETRION, "batch", str(requests), "--output", str(output), "--devices", "cpu:2")
        try:
            done = subprocess.run(
                line, capture_output=True, text=True, errors="replace", timeout=START_S + EACH_S * len(numbers)
            )
            exit_code, said = str(done.returncode), done.stdout + done.stderr
        except subprocess.TimeoutExpired:
            exit_code, said = "hung", ""
        entries, num_unreadable = read_manifest(output / MANIFEST)
        with open(requests, "rb") as file:
            expected = {number for number, text in enumerate(file, start=1) if text.strip()}
        unnamed = expected - {entry.get("line") for entry in entries}
        pixels = {pixels_of(output / f"{name}.png") for name in ids}
        strangers = [path.name for path in Path(folder).iterdir() if path not in (requests, output)]
    statuses = Counter(str(entry.get("status")) for entry in entries)
    row: Row = {
        "kind": "lines",
        "seed": seed,
        "first": numbers.start,
        "count": len(numbers),
        "exit_code": exit_code,
        "outcomes": dict(statuses),
        "unnamed": sorted(unnamed)[:20],
    }
    checks = [
        Check(name="lines: exit code", figure=exit_code, bound="0 or 1", holds=exit_code in ("0", "1")),
        none_of("lines: tracebacks", said.count("Traceback (most recent call last)")),
        none_of("lines: neither drawn nor named", len(unnamed)),
        none_of("lines: unreadable ones of the manifest", num_unreadable),
        none_of("lines: good ones without the same picture", len(pixels) - 1 + (None in pixels)),
        none_of("lines: files beside the folder", len(strangers)),
    ]
    return row, checks


def read_manifest(path: Path) -> tuple[list[Row], int]:
    """Its entries, and how many lines are none."""
    entries, num_unreadable = list[Row](), 0
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            entries.append(json.loads(text))
        except ValueError:
            num_unreadable += 1
    return entries, num_unreadable


def pixels_of(path: Path) -> bytes | None:
    """None where there is no picture."""
    try:
        with Image.open(path) as picture:
            return picture.tobytes()
    except OSError:
        return None
