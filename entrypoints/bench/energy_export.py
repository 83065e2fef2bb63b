"""Results in the layout of ML.ENERGY v3, so that the package mlenergy-data loads them beside the published ones.

    FOLDER/diffusion/<gpu>/current/run/diffusion/text-to-image/<org>/<model>/
        batch-1+size-<H>x<W>+steps-<S>+seed-0+uly-<U>+ring-1+tc-False/results.json
    FOLDER/configs/xdit/text-to-image/<org>/<model>/model_info.json      (found by itself)

An iteration there is a batch on its own; here it is a window with all GPUs in use. One picture's share of a window is
what is written: its joules, and as its time the mean latency.
"""

import datetime
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tetrion.entrypoints.bench.energy_run import MeasuredWindow, PointResult


def export(
    folder: Path, results: Sequence[PointResult], *, model: str, gpu: str, total_params_b: float, precision: str
) -> list[Path]:
    """Writes what has joules; a point without has no place in that layout. Returns the files."""
    org, name = model.split("/", 1) if "/" in model else ("tetrion", model)
    model_path = Path(_plain(org)) / _plain(name)
    written = []
    for result in results:
        if not result.windows or any(window.joules_per_image is None for window in result.windows):
            continue
        point = result.point
        config = (
            f"batch-1+size-{point.height}x{point.width}+steps-{point.num_steps}+seed-0"
            f"+uly-{point.degree}+ring-1+tc-False"
        )
        run = folder / "diffusion" / _plain(gpu) / "current" / "run" / "diffusion" / "text-to-image"
        written.append(_write(run / model_path / config / "results.json", _results(result, f"{org}/{name}")))
    if written:
        info = {
            "nickname": name,
            "total_parameters_billion": total_params_b,
            "activated_parameters_billion": total_params_b,
            "weight_precision": precision,
        }
        written.append(_write(folder / "configs" / "xdit" / "text-to-image" / model_path / "model_info.json", info))
    return written


def _results(result: PointResult, model_id: str) -> dict[str, Any]:
    point, windows = result.point, result.windows
    iterations = [_share(window) for window in windows]
    num_images = sum(window.num_images for window in windows)
    total_j = sum(window.energy.total_j or 0.0 for window in windows)
    total_s = sum(window.energy.seconds for window in windows)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model_id": model_id,
        "batch_size": 1,
        "num_iterations": len(windows),
        "height": point.height,
        "width": point.width,
        "inference_steps": point.num_steps,
        "seed": 0,
        "total_time": total_s,
        "total_energy": total_j,
        "energy_per_image": total_j / num_images,
        "energy_measurement": {"time": total_s, "gpu_energy": _sum([w.energy.gpu_j or {} for w in windows])},
        "iteration_energy_measurements": iterations,
        "configurations": {"ulysses_degree": point.degree, "ring_degree": 1, "use_torch_compile": False},
        "timeline": {"power": {"device_average": _power(windows)}, "temperature": _temperature(windows)},
        "tetrion": {"in_flight": point.in_flight, "num_images": num_images},
    }


def _share(window: MeasuredWindow) -> dict[str, Any]:
    """One picture's part of a window, in the form of one of Zeus' measurements."""
    gpu_j = {str(i): value / window.num_images for i, value in enumerate((window.energy.gpu_j or {}).values())}
    return {"time": statistics.mean(window.latencies_s), "gpu_energy": gpu_j, "cpu_energy": None, "dram_energy": None}


def _power(windows: Sequence[MeasuredWindow]) -> dict[str, list[list[float]]]:
    """GPU → (seconds metered so far, mean watts) of each window."""
    series: dict[str, list[list[float]]] = {}
    elapsed_s = 0.0
    for window in windows:
        elapsed_s += window.energy.seconds
        for i, joules in enumerate((window.energy.gpu_j or {}).values()):
            series.setdefault(str(i), []).append([elapsed_s, joules / window.energy.seconds])
    return series


def _temperature(windows: Sequence[MeasuredWindow]) -> dict[str, list[list[float]]]:
    """GPU → (seconds metered so far, °C) at the end of each window, as far as the GPUs tell."""
    series: dict[str, list[list[float]]] = {}
    elapsed_s = 0.0
    for window in windows:
        elapsed_s += window.energy.seconds
        for i, gpu in enumerate(window.gpus):
            if gpu.get("temperature_c") is not None:
                series.setdefault(str(i), []).append([elapsed_s, gpu["temperature_c"]])
    return series


def _sum(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    return {str(i): sum(part[uuid] for part in parts) for i, uuid in enumerate(parts[0])}


def _plain(name: str) -> str:
    """A name that a path can have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-") or "unknown"


def _write(path: Path, value: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")
    return path
