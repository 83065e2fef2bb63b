"""The options of `tetrion bench energy-saving`. Imports little but click, so that `--help` is quick."""

from typing import Any

import click

from tetrion.entrypoints.bench.slo_commands import FILE, POSITIVE, RESULT_OPTIONS, WORKLOAD_OPTIONS, spell, with_options
from tetrion.entrypoints.exit_codes import report_errors


@click.command("energy-saving")
@click.option("--profile", metavar="FILE", type=FILE, required=True, help="Cost table with joules (step_j), JSON.")
@click.option("--devices", type=POSITIVE, default=8, show_default=True, help="How many.")
@click.option(
    "--mode",
    type=click.Choice(["balanced", "least-energy"]),
    multiple=True,
    default=("least-energy",),
    show_default=True,
    help="Beside fastest; may be repeated.",
)
@click.option("--idle-watts", type=click.FloatRange(min=0), help="Of an idle GPU, for totals. Default: not counted.")
@click.option("--j-per-s", type=float, help="balanced: what a second earlier may cost. Default: the planner's.")
@click.option("--extra-j", type=float, help="least-energy: the share that widening may cost. Default: the planner's.")
@with_options(WORKLOAD_OPTIONS, RESULT_OPTIONS)
def energy_saving(**options: Any) -> int:
    """What energy modes save in simulation, between mode fastest and oracles that know no other request."""

    def run() -> int:
        from tetrion.entrypoints.bench.energy_saving import command

        given = {name: value for name, value in options.items() if value not in (None, False, ())}
        command(command_line=spell("energy-saving", given), **given)
        return 0

    return report_errors(run)
