"""All commands, one after the other, within a time: the longer, the more of each."""

import shlex
import subprocess
import sys
from pathlib import Path

import click

FULL_MINUTES = 60.0
"""So long they take with the figures of their defaults (of `fuzz` a part); of more time `mixed` takes what is left."""


def lines_for(minutes: float) -> list[list[str]]:
    """Command lines that together take about `minutes` on two idle cores; each server takes 15 s of them to start."""
    part = min(1.0, minutes / FULL_MINUTES)

    def of(full: float, least: float) -> str:
        return f"{max(least, full * part):.3g}"

    capacity = f"--capacity-s {of(25, 5)}"
    lines = (
        f"chaos --minutes {of(10, 0.5)} --undisturbed-s {of(60, 15)} {capacity}",
        f"stop --stopped-s {of(30, 10)} --tail-s {of(20, 5)} {capacity}",
        f"stops --minutes {of(5, 0.3)} {capacity}",
        f"resume --repeats {round(max(1, 3 * part))}",
        f"hogs --timeout-s {of(40, 10)}",
        f"overload --seconds {of(60, 5)} {capacity}",
        f"connections --seconds {of(90, 45)} --waiting {round(max(500, 5000 * part))}",
        f"fuzz --bodies {round(20_000 * part)} --streams {round(5_000 * part)} --lines {round(2_000 * part)}",
        f"mixed --minutes {max(minutes / 10, minutes - 35):.3g} {capacity}",
    )
    return [shlex.split(line) for line in lines]


def run_all(minutes: float, folder: Path) -> int:
    """1 if one of them fails; the others are run all the same."""
    codes: dict[str, int] = {}
    for name, *options in lines_for(minutes):
        line = [name, *options, "--output", str(folder / f"{name}.json")]
        click.secho(f"\n== {shlex.join(line)}", bold=True)
        codes[name] = subprocess.run([sys.executable, "-m", "benchmarks.soak", *line]).returncode
    click.echo("\n" + "\n".join(f"{'holds' if code == 0 else 'FAILS'}  {name}" for name, code in codes.items()))
    return int(any(codes.values()))
