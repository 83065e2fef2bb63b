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
from tetrion.entrypoints.recommend import Configuration

PUBLISHED = "mlenergy_v3_text_to_image.csv"


def read_source(path: Path | None) -> list[Configuration]:
    """A folder of results, one result or a CSV file; None: the published table. Raises InputError."""
    if path is None:
        return read_table((importlib.resources.files("tetrion.configs.energy") / PUBLISHED).read_text(), PUBLISHED)
    if path.is_dir():
        return [c for file in sorted(path.glob("*.json")) for c in _read_result(file, is_alone=False)]
    try:
        return read_table(path.read_text(), str(path)) if path.suffix == ".csv" else _read_result(path, is_alone=True)
    except OSError as error:
        raise InputError(f"source: cannot read {str(path)!r}: {error.strerror}") from None


def read_table(text: str, name: str) -> list[Configuration]:
    """Rows of a table in the columns of ML.ENERGY's. Raises InputError naming the line."""
    found = []
    for number, row in enumerate(csv.DictReader(text.splitlines()), start=2):
        try:
            found.append(
                Configuration(
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
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"source: {name}: line {number}: {error!r}") from None
    return found


def _read_result(path: Path, *, is_alone: bool) -> list[Configuration]:
    """Rows with joules. In a folder other records lie beside, so that a file without any is passed over there."""
    try:
        record = json.loads(path.read_text())
        rows, details = record["rows"], record.get("details") or [{}] * len(record["rows"])
        gpu = next((str(gpu["name"]) for gpu in record["host"].get("gpus", [])), "")
        pairs = zip(rows, details, strict=True)
        found = [_from_row(row, detail, gpu) for row, detail in pairs if row["joules_per_image"] is not None]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if is_alone:
            raise InputError(f"source: {path}: not a result of tetrion bench energy: {error!r}") from None
        return []
    if is_alone and not found:
        raise InputError(f"source: {path}: has no row with joules")
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
    left = [
        c
        for c in configurations
        if (model is None or model.lower() in c.model.lower())
        and (gpu is None or gpu.lower() in c.gpu.lower())
        and (size is None or size == (c.width, c.height))
        and (num_steps is None or num_steps == c.num_steps)
    ]
    if not left:
        raise InputError("recommend: nothing was measured for that model, GPU, size and number of steps")
    for option, values in (
        ("model", {c.model for c in left}),
        ("gpu", {c.gpu for c in left}),
        ("size", {f"{c.width}x{c.height}" for c in left}),
        ("num-steps", {str(c.num_steps) for c in left}),
    ):
        exact = [value for value in values if option == "model" and model and value.split("/")[-1] == model]
        if len(values) > 1 and not exact:
            raise InputError(f"{option}: say which, there are {', '.join(sorted(values))}")
        if exact:
            left = [c for c in left if c.model == exact[0]]
    return left
