"""The record of `tetrion bench step` on GPUs: rows of step times and sections of other findings, saved as they come.

Owns what is in it already, and its table for people. A run that was cut short is gone on with by another one on the
same machine: what is known is not measured again, what was begun is begun anew.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tetrion.engine.measure.probe import Size
from tetrion.entrypoints.bench.step_points import px_of
from tetrion.entrypoints.errors import InputError

OURS, FLOOR = "tetrion", "floor"
Row = dict[str, Any]
Point = tuple[Size, int]
"""A size and a degree."""
FINISHED = "finished"
MACHINE = ("cpu", "num_cores", "torch")


class StepRecord:
    """`contents`: the JSON object. `save` is called whenever it has grown, `report` is told of every row."""

    def __init__(
        self, contents: dict[str, Any], save: Callable[[], None], report: Callable[[str], None] = lambda _: None
    ) -> None:
        self.contents, self._save, self._report = contents, save, report
        contents["rows"] = [row for row in contents["rows"] if row["ms"] is not None]
        contents.pop("cut_short", None)

    @property
    def rows(self) -> list[Row]:
        rows: list[Row] = self.contents["rows"]
        return rows

    # Step times ---------------------------------------------------------------------------------------------------

    def lacks(self, system: str, points: Iterable[Point]) -> list[Point]:
        known = {(row["px"], row["degree"]) for row in self.rows if row["system"] == system}
        return [(size, degree) for size, degree in points if (px_of(size), degree) not in known]

    def floor_of(self, size: Size, degree: int) -> float | None:
        rows = [
            row for row in self.rows if row["system"] == FLOOR and (row["px"], row["degree"]) == (px_of(size), degree)
        ]
        return rows[-1]["ms"] if rows else None

    def add(self, system: str, size: Size, degree: int, ms: float | None, **more: Any) -> None:
        """A row. Add a size and degree's floor before the systems that are measured by it."""
        floor_ms = ms if system == FLOOR else self.floor_of(size, degree)
        ratio = None if ms is None or floor_ms is None else ms / floor_ms
        row = {"system": system, "px": px_of(size), "degree": degree, "ms": ms, "floor_ms": floor_ms, "ratio": ratio}
        self.rows.append(row | more)
        self._save()
        text = f"{number(ms, 2)} ms" + ("" if ratio is None else f", {ratio:.3f} of the floor")
        self._report(
            f"{system}, {px_of(size)} at degree {degree}: {text}" + (f" ({more['reason']})" if ms is None else "")
        )

    def add_missing(self, system: str, points: Iterable[Point], reason: str) -> None:
        for size, degree in points:
            self.add(system, size, degree, None, reason=reason)

    # Sections -----------------------------------------------------------------------------------------------------

    def begin(self, section: str, part: str) -> list[Row] | None:
        """The section's list, to be added to by `grow`; None if that part of it is known."""
        if f"{section} {part}" in self.contents.setdefault(FINISHED, []):
            return None
        rows: list[Row] = self.contents.setdefault(section, [])
        rows[:] = [row for row in rows if row["part"] != part]
        return rows

    def grow(self, section: str, part: str, row: Row) -> None:
        self.contents[section].append({"part": part, **row})
        self._save()
        self._report(f"{section}, {part}: {json.dumps(row, ensure_ascii=False)}")

    def finish(self, section: str, part: str) -> None:
        self.contents[FINISHED].append(f"{section} {part}")
        self._save()

    def cut_short(self, reason: str) -> None:
        self.contents["cut_short"] = reason
        self._save()


def read_record(path: Path, host: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run on this machine left. Raises InputError for another machine's, or for no record."""
    try:
        contents: dict[str, Any] = json.loads(path.read_bytes())
        theirs, ours = (_machine(facts) for facts in (contents["host"], host))
        rows = contents["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"output: {str(path)!r} holds no record to go on with: {error!r}") from None
    if theirs != ours or not isinstance(rows, list):
        raise InputError(f"output: {str(path)!r} was measured on another machine: {theirs}, this is {ours}")
    return contents


def _machine(host: dict[str, Any]) -> list[Any]:
    return [*(host[name] for name in MACHINE), *(gpu["uuid"] for gpu in host.get("gpus", []))]


def table(contents: dict[str, Any]) -> str:
    """The record as text for people."""
    lines = [f"{'system':<20}{'px':>10}{'degree':>8}{'ms':>11}{'floor':>10}{'ratio':>8}"]
    for row in sorted(contents["rows"], key=lambda row: pixels(row["px"])):
        ms, floor_ms, ratio = (number(row[name], digits) for name, digits in (("ms", 2), ("floor_ms", 2), ("ratio", 3)))
        line = f"{row['system']:<20}{row['px']:>10}{row['degree']:>8}{ms:>11}{floor_ms:>10}{ratio:>8}"
        lines.append(f"{line}  {row['reason']}" if "reason" in row else line)
    for row in contents.get("resizing", []):
        first, second = row["groups"]
        added = f"{row['added_ms']:+.3f} ms between steps, before a first visit's {row['first_visit_ms']:.2f} ms"
        lines.append(f"a new group every step, {row['px']}: {first} ↔ {second}: {added}")
    for row in contents.get("idle_gaps", []):
        gap = f"{number(row['median_ms'], 3)} ms, at most {number(row['max_ms'], 3)} ms ({row['num_gaps']} gaps)"
        entry = f"{number(row['until_entered_ms'], 3)} ms with the next one's entry"
        lines.append(f"idle between chunks, {row['px']} at degree {row['degree']}: median {gap}, {entry}")
    differing = [row for row in contents.get("exactness", []) if not row["bit_identical"]]
    for row in differing:
        lines.append(f"not exact: {row['px']}, {row['schedule']}: largest difference {row['max_difference']:.3g}")
    if contents.get("exactness") and not differing:
        lines.append(f"exactness: {len(contents['exactness'])} schedules gave degree 1's latents, bit for bit")
    if "exchange" in contents:
        lines.append(f"members exchange through {contents['exchange']}")
    if "cut_short" in contents:
        lines.append(f"cut short: {contents['cut_short']}")
    return "\n".join(lines)


def pixels(px: int | str) -> int:
    """Of a row's size: 1024 is 1024x1024."""
    width, height = (int(side) for side in f"{px}x{px}".split("x")[:2])
    return width * height


def number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
