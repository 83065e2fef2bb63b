"""`tetrion bench energy`: joules a picture on a running engine, as a sweep or under arrivals in an open loop.

Owns the rows and the record. What is measured is in `energy_points.py`, how in `energy_run.py`.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from tetrion.engine.api import AsyncEngine
from tetrion.engine.config import EngineConfig
from tetrion.engine.energy.meters.base import MeterUnavailable
from tetrion.engine.measure.profile_files import chosen_profiles
from tetrion.engine.shape import cost_key_of_size
from tetrion.entrypoints.bench.energy_export import export
from tetrion.entrypoints.bench.energy_points import EnergyPoint, SweepOptions, describe, sweep_points
from tetrion.entrypoints.bench.energy_published import published_beside
from tetrion.entrypoints.bench.energy_run import EnergyBench, PointResult, SteadyState, joules
from tetrion.entrypoints.bench.ledger import ledger_facts
from tetrion.entrypoints.bench.live import HEAD_START_S
from tetrion.entrypoints.bench.workloads import Trace
from tetrion.entrypoints.energy_windows import CounterWindows, EnergyWindows, WindowEnergy, ZeusWindows
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.options import only_model
from tetrion.entrypoints.record import check_writable, make_record, write_record
from tetrion.entrypoints.session import open_engine, run_async

Row = dict[str, Any]
ITEMSIZE = {"cuda": 2, "cpu": 4}
NOT_AT_ITS_END = "the sweep was under way"


def command(
    config: EngineConfig,
    options: SweepOptions,
    *,
    trace: Trace | None = None,
    windows: str = "meter",
    dry_run: bool = False,
    export_folder: Path | None = None,
    output: Path | None = None,
    as_json: bool = False,
    command_line: str = "tetrion bench energy",
) -> int:
    """Measure and report; with `dry_run` only say what would be done. `trace`: an open loop in place of the sweep."""
    check_writable(output, "output")
    only_model(config)
    engine = open_engine(config)
    legal = engine.spec.legal_degrees(len(engine.devices))
    if unknown := [degree for degree in options.degrees if degree not in legal]:
        raise InputError(f"degrees: {unknown[0]} is not one of {', '.join(map(str, legal))}")
    points = sweep_points(options, len(engine.devices))
    if dry_run:
        plan = _plan_of_trace(trace, options) if trace is not None else _plan_of_sweep(engine, points, options)
        print(json.dumps(plan, indent=None if as_json else 1))
        return 0
    return run_async(_measure(engine, points, options, trace, windows, export_folder, output, as_json, command_line))


async def _measure(
    engine: AsyncEngine,
    points: Sequence[EnergyPoint],
    options: SweepOptions,
    trace: Trace | None,
    windows: str,
    export_folder: Path | None,
    output: Path | None,
    as_json: bool,
    command_line: str,
) -> int:
    def record(rows: list[Row], details: list[Row]) -> Row:
        made = make_record(command_line, rows)
        made["details"] = details
        made["meter"] = {"source": engine.meter.source, "reason": engine.meter.reason, "windows": windows}
        made["ledger"] = ledger_facts(engine.stats())
        made["receipt"] = None if bench.latest_receipt is None else msgspec.to_builtins(bench.latest_receipt)
        return made

    def record_swept(results: Sequence[PointResult]) -> Row:
        rows = [_row(engine, result, idle) for result in results]
        details = [
            _detail(result, idle) | {"published": published_beside(row, _gpu_name(result))}
            for row, result in zip(rows, results, strict=True)
        ]
        return record(rows, details)

    def after_round(results: Sequence[PointResult]) -> None:
        """A sweep that is ended from outside leaves what there is."""
        if output is not None:
            write_record(record_swept(results) | {"cut_short": NOT_AT_ITS_END}, output)

    async with engine:
        bench = EnergyBench(engine, _open_windows(engine, windows), _to_stderr)
        idle = await bench.idle(options)
        if trace is not None:
            steady = await bench.arrivals(trace)
            made = record([_open_loop_row(engine, steady, trace, idle)], [_open_loop_detail(steady)])
        else:
            results = await bench.sweep(points, options, after_round)
            made = record_swept(results)
            if export_folder is not None:
                _export(engine, results, export_folder)
    text = write_record(made, output)
    print(text if as_json else table(made["rows"], made["details"]))
    return 0


def _open_windows(engine: AsyncEngine, name: str) -> EnergyWindows:
    """The meter's own counters, or Zeus. Raises InputError where Zeus is not there."""
    if name == "meter":
        return CounterWindows(engine.meter)
    if any(device.kind != "cuda" for device in engine.devices):
        raise InputError("windows: zeus measures GPUs, and the devices are CPUs")
    indices = list(dict.fromkeys(device.index for device in engine.devices))
    try:
        return ZeusWindows(list(zip(indices, engine.meter.uuids, strict=False)))
    except MeterUnavailable as error:
        raise InputError(f"windows: {error}") from None


def _row(engine: AsyncEngine, result: PointResult, idle: WindowEnergy) -> Row:
    point, windows = result.point, result.windows
    joules_per_image, ci95, _ = joules(windows)
    latencies_s = [latency_s for window in windows for latency_s in window.latencies_s]
    total_j = None if joules_per_image is None else sum(window.energy.total_j or 0.0 for window in windows)
    seconds = sum(window.energy.seconds for window in windows)
    return {
        "system": "tetrion",
        "model": engine.spec.name,
        "px": f"{point.width}x{point.height}",
        "steps": point.num_steps,
        "devices": len(engine.devices),
        "degree": point.degree,
        "batch": 1,
        "joules_per_image": joules_per_image,
        "ci95": ci95,
        "latency_s": statistics.mean(latencies_s) if latencies_s else None,
        "watts": total_j / seconds if total_j is not None else None,
        "idle_watts": _idle_watts(idle),
    }


def _open_loop_row(engine: AsyncEngine, steady: SteadyState, trace: Trace, idle: WindowEnergy) -> Row:
    """Fields in which the requests of a trace differ, or that the policy decides, are None."""
    window = steady.window
    sizes, steps = {(r.width, r.height) for r in trace}, {r.num_steps for r in trace}
    total_j = window.energy.total_j
    return {
        "system": "tetrion open loop",
        "model": engine.spec.name,
        "px": "{}x{}".format(*sizes.pop()) if len(sizes) == 1 else None,
        "steps": steps.pop() if len(steps) == 1 else None,
        "devices": len(engine.devices),
        "degree": None,
        "batch": 1,
        "joules_per_image": total_j / window.num_images if total_j is not None and window.num_images else None,
        "ci95": None,
        "latency_s": statistics.mean(window.latencies_s) if window.latencies_s else None,
        "watts": None if total_j is None else total_j / window.energy.seconds,
        "idle_watts": _idle_watts(idle),
    }


def _detail(result: PointResult, idle: WindowEnergy) -> Row:
    windows = result.windows
    return {
        "reason": joules(windows)[2] or None,
        "idle_reason": idle.reason or None,
        "in_flight": result.point.in_flight,
        "num_windows": len(windows),
        "window_s": [window.energy.seconds for window in windows],
        "window_j": [window.energy.total_j for window in windows],
        "latencies_s": [latency_s for window in windows for latency_s in window.latencies_s],
        "gpus": [window.gpus for window in windows],
    }


def _gpu_name(result: PointResult) -> str:
    return next((str(gpu["name"]) for window in result.windows for gpu in window.gpus), "")


def _open_loop_detail(steady: SteadyState) -> Row:
    return {
        "reason": steady.window.energy.reason or None,
        "steady_from_s": steady.from_s,
        "steady_to_s": steady.to_s,
        "steady_s": steady.to_s - steady.from_s,
        "num_images": steady.window.num_images,
        "num_requests": steady.num_requests,
        "by_class": msgspec.to_builtins(steady.by_class),
        "latencies_s": list(steady.window.latencies_s),
        "gpus": steady.window.gpus,
    }


def _idle_watts(idle: WindowEnergy) -> float | None:
    return None if idle.total_j is None else idle.total_j / idle.seconds


def _export(engine: AsyncEngine, results: Sequence[PointResult], folder: Path) -> None:
    kind = engine.devices[0].kind
    gpus = [gpu for result in results for window in result.windows for gpu in window.gpus]
    written = export(
        folder,
        results,
        model=engine.spec.name,
        gpu=str(gpus[0]["name"]) if gpus else kind,
        total_params_b=engine.stats().weights_bytes / ITEMSIZE[kind] / 1e9,
        precision="bfloat16" if kind == "cuda" else "float32",
    )
    if not written:
        _to_stderr("export: nothing was written, since no point has joules")


def _plan_of_sweep(engine: AsyncEngine, points: Sequence[EnergyPoint], options: SweepOptions) -> Row:
    """With the latencies of the cost table, if the engine would start with one."""
    profile = chosen_profiles(engine.devices, engine.models, engine.config).get(engine.spec.name)

    def latency_s(point: EnergyPoint) -> float | None:
        if profile is None:
            return None
        cost = profile.cost(cost_key_of_size((point.width, point.height)))
        return sum(cost.aux_s.values()) + point.num_steps * cost.step_s(point.degree)

    return describe(points, options, latency_s)


def _plan_of_trace(trace: Trace, options: SweepOptions) -> Row:
    """Idle power, then until the last arrival."""
    least_s = options.cool_s + options.window_s + HEAD_START_S + trace[-1].arrival_s
    return {"num_requests": len(trace), "least_duration_s": round(least_s, 1)}


def table(rows: Sequence[Row], details: Sequence[Row]) -> str:
    """The rows as text for people. published: what ML.ENERGY v3 gives for the same, and our joules as a share of it;
    °C: the hottest GPU at the end of any window."""
    head = f"{'size':<12}{'steps':>6}{'degree':>7}{'J/image':>10}{'± %':>7}{'latency s':>11}{'W':>8}{'idle W':>8}"
    lines = [f"{head}{'°C':>6}{'published J':>13}{'share':>7}{'latency s':>11}"]
    for row, detail in zip(rows, details, strict=True):
        half = None if row["ci95"] is None else 100 * (row["ci95"][1] / row["joules_per_image"] - 1)
        beside = detail.get("published") or dict.fromkeys(("joules_per_image", "share_of_published", "latency_s"))
        lines.append(
            f"{row['px'] or 'mixed':<12}{row['steps'] or '–':>6}{row['degree'] or '–':>7}"
            f"{_number(row['joules_per_image'], 1):>10}{_number(half, 1):>7}{_number(row['latency_s'], 3):>11}"
            f"{_number(row['watts'], 0):>8}{_number(row['idle_watts'], 0):>8}{_number(_hottest(detail), 0):>6}"
            f"{_number(beside['joules_per_image'], 0):>13}{_number(beside['share_of_published'], 2):>7}"
            f"{_number(beside['latency_s'], 3):>11}"
        )
    reasons = {detail["reason"] for detail in details if detail["reason"]}
    return "\n".join([*lines, *(f"no joules: {reason}" for reason in sorted(reasons))])


def _hottest(detail: Row) -> float | None:
    """In a sweep `gpus` has a list for each window."""
    gpus = [gpu for part in detail["gpus"] for gpu in (part if isinstance(part, list) else [part])]
    return max((gpu["temperature_c"] for gpu in gpus if gpu.get("temperature_c") is not None), default=None)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
