"""The options of `tetrion bench energy-saving`. Imports little but click, so that `--help` is quick."""

from typing import Any

import click

from tetrion.entrypoints.bench.slo_commands import (
    ENGINE_OPTIONS,
    FILE,
    RESULT_OPTIONS,
    WORKLOAD_OPTIONS,
    number_of_devices,
    spell,
    with_options,
)
from tetrion.entrypoints.exit_codes import report_errors
from tetrion.entrypoints.number_range import NumberRange

PRICE = NumberRange(0, 1_000_000_000, min_open=True)


@click.command("energy-saving")
@click.option("--profile", metavar="FILE", type=FILE, required=True, help="Cost table with joules (step_j), JSON.")
@click.option("--live", is_flag=True, help="On an engine in this process, which runs on that table.")
@click.option("--devices", metavar="N|LIST", help="Simulated: how many (default 8). Live: as for generate, e.g. cpu:2.")
@click.option(
    "--mode",
    type=click.Choice(["balanced", "least-energy"]),
    multiple=True,
    default=("least-energy",),
    show_default=True,
    help="Beside fastest; may be repeated.",
)
@click.option("--idle-watts", type=NumberRange(0, 100_000), help="Of an idle GPU, for totals. Default: not counted.")
@click.option("--j-per-s", type=PRICE, help="balanced: what a second earlier may cost. Default: the planner's.")
@click.option(
    "--extra-j", type=NumberRange(0, 10), help="least-energy: the share that widening may cost. Default: the planner's."
)
@with_options(WORKLOAD_OPTIONS, ENGINE_OPTIONS, RESULT_OPTIONS)
def energy_saving(**options: Any) -> int:
    """What energy modes save, simulated or live, between mode fastest and oracles that know no other request."""

    def run() -> int:
        from tetrion.entrypoints.bench.energy_saving import command
        from tetrion.entrypoints.errors import InputError
        from tetrion.entrypoints.session import EngineOptions

        given = {name: value for name, value in options.items() if value not in (None, False, ())}
        command_line = spell("energy-saving", given)
        is_live, devices = given.pop("live", False), given.pop("devices", None)
        engine = {name: given.pop(name) for name in ("model", "load_format", "num_threads") if name in given}
        if is_live:
            planner = tuple(f"{name}={given[name]}" for name in ("j_per_s", "extra_j") if name in given)
            profile = str(given["profile"])
            given["live"] = EngineOptions(devices=devices, profile=profile, planner=planner, **engine)
        elif engine:
            raise InputError(f"{next(iter(engine))}: is for --live")
        elif devices is not None:
            given["devices"] = number_of_devices(devices)
        command(command_line=command_line, **given)
        return 0

    return report_errors(run)
