"""Where `tetrion recommend` takes configurations from: results of `tetrion bench energy`, or the published table.

The published table is ML.ENERGY's (see `configs/energy/SOURCE.md`), shipped unchanged as CSV.
"""

import csv
import importlib.resources
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.recommend.choice import Configuration

PUBLISHED = "mlenergy_v3_text_to_image.csv"


class NotAResult(InputError):
    """The file is something else than a record of `tetrion bench energy`."""


def read_source(path: Path | None) -> list[Configuration]:
    """A folder of results, one result or a CSV file; None: the published table. Never empty: raises InputError, which
    says why there is nothing."""
    if path is None:
        return read_table((importlib.resources.files("tetrion.configs.energy") / PUBLISHED).read_text(), PUBLISHED)
    if path.is_dir():
        return _read_folder(path)
    return read_table(_text_of(path), str(path)) if path.suffix == ".csv" else _read_result(path)


def read_table(text: str, name: str) -> list[Configuration]:
    """Rows of a table in the columns of ML.ENERGY's. Raises InputError naming the line."""
    rows = csv.DictReader(text.splitlines())
    try:
        found = [_from_line(row) for row in rows]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(f"source: {name}: line {rows.line_num}: {error!r}") from None
    if not found:
        raise InputError(f"source: {name}: has no row")
    return found


def _from_line(row: dict[str, str]) -> Configuration:
    return Configuration(
        system="ML.ENERGY v3",
        model=row["model_id"],
        gpu=row["gpu_model"],
        width=int(row["width"]),
        height=int(row["height"]),
        num_steps=int(row["inference_steps"]),
        num_gpus=int(row["num_gpus"]),
        ulysses_degree=int(row["ulysses_degree"]),
        ring_degree=int(row["ring_degree"]),
        batch=int(row["batch_size"]),
        joules_per_image=float(row["energy_per_image_j"]),
        latency_s=float(row["batch_latency_s"]),
        watts=float(row["avg_power_w"]),
    )


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"source: cannot read {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"source: cannot read {str(path)!r}: it is not UTF-8 text: {error}") from None


def _read_folder(folder: Path) -> list[Configuration]:
    """Other records lie beside results there: files without a configuration matter only if there is no other."""
    found: list[Configuration] = []
    reasons = []
    for file in sorted(folder.glob("*.json")):
        try:
            found += _read_result(file)
        except NotAResult:
            continue
        except InputError as error:
            reasons.append(str(error))
    if not found:
        raise InputError("; ".join(reasons) or f"source: {folder}: has no result of tetrion bench energy (*.json)")
    return found


def _read_result(path: Path) -> list[Configuration]:
    """Rows with joules and a degree."""
    text = _text_of(path)
    try:
        record = json.loads(text)
        rows, details = record["rows"], record.get("details") or [{}] * len(record["rows"])
        gpu = next((str(gpu["name"]) for gpu in record["host"].get("gpus", [])), "")
        metered = [pair for pair in zip(rows, details, strict=True) if pair[0]["joules_per_image"] is not None]
        found = [_from_row(row, detail, gpu) for row, detail in metered if row["degree"] is not None]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotAResult(f"source: {path}: not a result of tetrion bench energy: {error!r}") from None
    if not metered:
        raise InputError(f"source: {path}: has no row with joules")
    if not found:
        raise InputError(
            f"source: {path}: has only rows without a degree: those of an open loop (--rate, --trace) count the time"
            " between arrivals too and are no configuration to choose; measure a sweep"
        )
    return found


def _from_row(row: dict[str, Any], detail: dict[str, Any], gpu: str) -> Configuration:
    width, height = map(int, str(row["px"]).split("x"))
    return Configuration(
        system=row["system"],
        model=row["model"],
        gpu=gpu,
        width=width,
        height=height,
        num_steps=row["steps"],
        num_gpus=row["devices"],
        ulysses_degree=row["degree"],
        batch=row["batch"],
        joules_per_image=row["joules_per_image"],
        ci95=None if row["ci95"] is None else (row["ci95"][0], row["ci95"][1]),
        latency_s=row["latency_s"],
        latencies_s=tuple(detail.get("latencies_s", ())),
        watts=row["watts"],
    )


def select(
    configurations: Sequence[Configuration],
    *,
    model: str | None = None,
    gpu: str | None = None,
    size: tuple[int, int] | None = None,
    num_steps: int | None = None,
) -> list[Configuration]:
    """Those of one kind of picture on one kind of GPU. `model` and `gpu` may be parts of names.

    Raises InputError naming what there is, if nothing or more than one kind is left.
    """
    asked = {
        "model": model,
        "gpu": gpu,
        "size": None if size is None else f"{size[0]}x{size[1]}",
        "num-steps": None if num_steps is None else str(num_steps),
    }
    left = list(configurations)
    for option, wanted in asked.items():
        there = {_kind(c)[option] for c in left}
        left = [c for c in left if wanted is None or _is_meant(option, wanted, _kind(c)[option])]
        if wanted is not None and not left:
            raise InputError(f"{option}: nothing was measured for {wanted!r}, there are {_listed(there)}")
    for option in asked:
        values = {_kind(c)[option] for c in left}
        exact = [value for value in values if option == "model" and model and value.split("/")[-1] == model]
        if len(values) > 1 and not exact:
            raise InputError(f"{option}: say which, there are {_listed(values)}")
        if exact:
            left = [c for c in left if c.model == exact[0]]
    return left


def _kind(configuration: Configuration) -> dict[str, str]:
    """What has to be the same for two configurations to be compared, by option."""
    return {
        "model": configuration.model,
        "gpu": configuration.gpu,
        "size": f"{configuration.width}x{configuration.height}",
        "num-steps": str(configuration.num_steps),
    }


def _is_meant(option: str, wanted: str, value: str) -> bool:
    return wanted.lower() in value.lower() if option in ("model", "gpu") else wanted == value


def _listed(values: set[str]) -> str:
    return ", ".join(value or "unnamed" for value in sorted(values))
