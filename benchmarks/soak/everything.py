"""All commands, one after the other, within a time: the longer, the more of each."""

import shlex
import subprocess
import sys
from pathlib import Path

import click

FULL_MINUTES = 60.0
"""From here on each command has the figures of its defaults; those that may take longer take what is left."""


def lines_for(minutes: float) -> list[list[str]]:
    """Command lines that together take about `minutes` on two cores; a start of a server takes 15 s of each."""
    part = min(1.0, minutes / FULL_MINUTES)
    stopped_s = max(5.0, 30 * min(1.0, 2 * part))
    chosen = [
        f"chaos --minutes {min(10.0, minutes / 6):.3g} --undisturbed-s {max(10, 60 * part):.3g} --capacity-s {max(5, 25 * part):.3g}",
        f"stop --stopped-s {stopped_s:.3g} --tail-s {max(5, 20 * part):.3g} --capacity-s {max(5, 25 * part):.3g}",
        f"stops --minutes {min(5.0, minutes / 15):.3g} --capacity-s {max(5, 25 * part):.3g}",
        f"resume --repeats {max(1, round(3 * part))}",
        f"hogs --timeout-s {max(10, 40 * part):.3g}",
        f"connections --seconds {max(45, 90 * part):.3g} --waiting {round(max(500, 5000 * part))}",
        f"fuzz --bodies {round(100_000 * part)} --streams {round(10_000 * part)} --lines {round(10_000 * part)}",
        f"mixed --minutes {max(minutes / 10, minutes - 35):.3g} --capacity-s {max(5, 25 * part):.3g}",
    ]
    return [shlex.split(line) for line in chosen]


def run_all(minutes: float, folder: Path) -> int:
    """1 if one of them fails; the others are run all the same."""
    codes: dict[str, int] = {}
    for name, *options in lines_for(minutes):
        line = [name, *options, "--output", str(folder / f"{name}.json")]
        click.secho(f"\n== {shlex.join(line)}", bold=True)
        codes[name] = subprocess.run([sys.executable, "-m", "benchmarks.soak", *line]).returncode
    click.echo("\n" + "\n".join(f"{'holds' if code == 0 else 'FAILS'}  {name}" for name, code in codes.items()))
    return int(any(codes.values()))
