"""`tetrion bench step`: how long a denoising step takes, beside what else this machine can run.

On CPUs see `step_on_cpus`, on GPUs `step_on_gpus`; here are the options, the record's way out and the picture.
"""

import sys
from pathlib import Path
from typing import Any

from tetrion.engine.config import EngineConfig, parse_devices
from tetrion.engine.families.served import read_model
from tetrion.engine.model_spec import ModelSpec
from tetrion.entrypoints.bench import step_on_cpus
from tetrion.entrypoints.bench.step_on_gpus import OTHERS, SECTIONS, StepBench, StepOptions
from tetrion.entrypoints.bench.step_picture import draw_steps
from tetrion.entrypoints.bench.step_record import FLOOR, OURS, StepRecord, read_record, table
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.options import only_model, refuse_roles
from tetrion.entrypoints.plotting import check_png
from tetrion.entrypoints.profile import checked_degrees, checked_sizes
from tetrion.entrypoints.record import check_writable, make_record, write_record

SIZES = ((256, 256), (512, 512), (1024, 1024), (2048, 2048))
SYSTEMS = (OURS, FLOOR, *OTHERS)
CPU_STEPS = 12
FACTS = ("model", "load_format", "text_tokens", "batch")


def command(
    config: EngineConfig,
    *,
    command_line: str,
    num_steps: int | None = None,
    repeats: int = 5,
    sizes: str | None = None,
    degrees: str | None = None,
    systems: str | None = None,
    sections: str | None = None,
    seconds: float = 5.0,
    budget_s: float = 3600.0,
    output: Path | None = None,
    plot: Path | None = None,
    resume: bool = False,
    rehearse: bool = False,
    as_json: bool = False,
) -> dict[str, Any]:
    """What `tetrion bench step` does: measure, print the table (or one JSON object), write `output` and `plot`.

    Returns the record. Raises InputError, or CheckpointError.
    """
    refuse_roles(config)
    model, devices = only_model(config), parse_devices(config.devices)
    check_writable(output, "output")
    if plot is not None:
        check_png(plot, "plot")
    if devices[0].kind == "cpu" and not rehearse:
        record = step_on_cpus.run(
            command_line,
            model=model,
            num_workers=len(devices),
            num_steps=num_steps or CPU_STEPS,
            repeats=repeats,
            report=_report,
        )
        text = write_record(record, output)
        print(text if as_json else step_on_cpus.table(record))
        return record
    spec = read_model(model, config.load_format)
    options = StepOptions(
        sizes=checked_sizes(spec, sizes, SIZES),
        degrees=checked_degrees(spec, len(devices), degrees),
        systems=_checked_names("systems", systems, SYSTEMS),
        sections=_checked_names("sections", sections, SECTIONS),
        num_steps=num_steps or spec.num_steps,
        seconds=seconds,
        budget_s=budget_s,
    )
    record = make_record(command_line, []) | _facts(spec, config.load_format)
    if resume and output is not None and output.exists():
        record = _resumed(read_record(output, record["host"]), record)
    StepBench(config, spec, devices, options, StepRecord(record, lambda: _save(record, output), _report)).run()
    text = write_record(record, output)
    print(text if as_json else table(record))
    if plot is not None:
        draw_steps(record["rows"], f"{spec.name}: one denoising step", plot)
    return record


def _facts(spec: ModelSpec, load_format: str) -> dict[str, Any]:
    return {"model": spec.name, "load_format": load_format, "text_tokens": spec.max_text_tokens, "batch": 1}


def _resumed(earlier: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The earlier record, with this run's command behind its own. Raises InputError if it is of something else."""
    if differing := [name for name in FACTS if earlier.get(name) != now[name]]:
        name = differing[0]
        raise InputError(f"output: to go on, {name} must be {earlier.get(name)!r} as in the record, not {now[name]!r}")
    commits = earlier["commit"] if earlier["commit"] == now["commit"] else f"{earlier['commit']}, {now['commit']}"
    return earlier | {"command": f"{earlier['command']}\n{now['command']}", "commit": commits}


def _checked_names(field: str, text: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    wanted = [name.strip() for name in text.split(",")] if text else known
    if unknown := [name for name in wanted if name not in known]:
        raise InputError(f"{field}: {unknown[0]!r} is not one of {', '.join(known)}")
    return tuple(name for name in known if name in wanted)


def _save(record: dict[str, Any], output: Path | None) -> None:
    """After every row: a run that is cut short leaves what it has."""
    write_record(record, output)


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
