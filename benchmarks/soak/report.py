"""What a run is judged by, its table on the terminal and its JSON file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from tetrion.entrypoints.record import make_record, write_record

Row = dict[str, Any]


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """`bound`: in words, such as "0" or "at most 2"."""

    name: str
    figure: Any
    bound: str
    holds: bool


def none_of(name: str, count: int) -> Check:
    return Check(name=name, figure=count, bound="0", holds=count == 0)


def at_most(name: str, figure: float | None, bound: float, unit: str = "") -> Check:
    """None: there was nothing to measure, which fails."""
    words = f"at most {bound:g}{unit}"
    return Check(name=name, figure=figure, bound=words, holds=figure is not None and figure <= bound)


def finish(command_line: str, rows: Sequence[Row], checks: Sequence[Check], output: Path) -> int:
    """Write the file, print the table. Returns the exit code: 1 if a check fails."""
    record = make_record(command_line, list(rows)) | {"checks": [msgspec.to_builtins(check) for check in checks]}
    write_record(record, output)
    for row in rows:
        click.echo("  ".join(f"{key} {_short(value)}" for key, value in row.items() if not isinstance(value, list)))
    width = max(len(check.name) for check in checks)
    for check in checks:
        verdict = "holds" if check.holds else "FAILS"
        click.echo(f"{verdict}  {check.name:<{width}}  {_short(check.figure)} ({check.bound})")
    click.echo(f"written: {output}")
    return 0 if all(check.holds for check in checks) else 1


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_short(one)}" for key, one in value.items()) + "}"
    return str(value)
