"""`tetrion bench step`: what the engine adds to the model, and what a second worker brings.

Two comparisons on the machine it runs on, every pair interleaved (A B A B …) and compared by medians:

* one whole request at degree 1 through the engine beside diffusers' FluxPipeline: same weights, steps and threads;
* one-thread workers: a request's step time at each degree beside degree 1.
"""

import asyncio
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tetrion.engine.api import AsyncEngine
from tetrion.engine.config import EngineConfig, parse_devices
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.request import ImageRequest
from tetrion.entrypoints.bench.record import make_record, write_record

PROMPT = "a red circle left of a large blue star"
SIZES = (256, 512)
Row = dict[str, Any]


class DiffusersBaseline:
    """A process that runs diffusers' pipeline on `num_threads` threads."""

    def __init__(self, spec: ModelSpec, num_threads: int) -> None:
        arguments = [spec.path, str(num_threads), str(spec.max_text_tokens)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tetrion.entrypoints.bench.diffusers_baseline", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self, px: int, num_steps: int, seed: int) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({"px": px, "num_steps": num_steps, "seed": seed}), file=self._process.stdin, flush=True)
        return float(json.loads(self._process.stdout.readline())["seconds"])

    def close(self) -> None:
        self._process.communicate()


async def compare_with_diffusers(model: str, num_threads: int, num_steps: int, repeats: int) -> list[Row]:
    """Whole requests at degree 1: rows of systems `tetrion` and `diffusers`, milliseconds per request."""
    rows = []
    config = EngineConfig(model=model, devices="cpu:1", num_threads=num_threads)
    async with AsyncEngine(config) as engine:
        baseline = DiffusersBaseline(engine.spec, num_threads)
        try:
            for px in (size for size in SIZES if size <= engine.spec.max_size):
                ours, theirs = [], []
                for seed in range(repeats + 1):
                    request = ImageRequest(prompt=PROMPT, width=px, height=px, num_steps=num_steps, seed=seed)
                    ours.append((await engine.generate(request)).latency_s)
                    theirs.append(await asyncio.to_thread(baseline.seconds, px, num_steps, seed))
                common = {"px": px, "degree": 1, "num_steps": num_steps, "threads": num_threads, "floor_ms": None}
                baseline_ms = 1e3 * statistics.median(theirs[1:])
                rows.append({"system": "diffusers", "ms": baseline_ms, "ratio": 1.0, **common})
                ours_ms = 1e3 * statistics.median(ours[1:])
                rows.append({"system": "tetrion", "ms": ours_ms, "ratio": ours_ms / baseline_ms, **common})
        finally:
            baseline.close()
    return rows


async def compare_degrees(model: str, num_workers: int, num_steps: int, repeats: int) -> tuple[list[Row], Row]:
    """Step times at each legal degree of one-thread workers: milliseconds per step, ratio to degree 1.

    Returns the rows, and what the workers' shared weights occupy.
    """
    rows: list[Row] = []
    config = EngineConfig(model=model, devices=f"cpu:{num_workers}", num_threads=1)
    async with AsyncEngine(config) as engine:
        degrees = engine.spec.legal_degrees(num_workers)
        for px in (size for size in SIZES if size <= engine.spec.max_size):
            step_ms: dict[int, list[float]] = {degree: [] for degree in degrees}
            for seed in range(repeats + 1):
                for degree in degrees:
                    request = ImageRequest(
                        prompt=PROMPT, width=px, height=px, num_steps=num_steps, seed=seed, force_degrees=(degree,)
                    )
                    result = await engine.generate(request)
                    step_ms[degree].append(1e3 * result.denoise_s / num_steps)
            medians = {degree: statistics.median(times[1:]) for degree, times in step_ms.items()}
            for degree in degrees:
                ms = medians[degree]
                common = {"px": px, "degree": degree, "num_steps": num_steps, "threads": 1, "floor_ms": None}
                rows.append({"system": "tetrion step", "ms": ms, "ratio": ms / medians[degrees[0]], **common})
        return rows, weights_residency(list(engine.worker_pids().values()), engine.stats().weights_bytes)


def weights_residency(pids: list[int], weights_bytes: int) -> Row:
    """Resident and proportional set size of the shared weights over all workers, in bytes; null where /proc is not.

    Each page counts whole for every worker that maps it in the resident size, and once in all in the proportional one.
    """
    totals = {"Rss": 0, "Pss": 0}
    try:
        for pid in pids:
            is_weights = False
            for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
                name, _, value = line.partition(":")
                if "-" in name.split(" ")[0]:
                    is_weights = "tetrion-weights" in line
                elif is_weights and name in totals:
                    totals[name] += 1024 * int(value.split()[0])
    except OSError:
        return {"num_workers": len(pids), "weights_bytes": weights_bytes, "rss_bytes": None, "pss_bytes": None}
    sizes = {"rss_bytes": totals["Rss"], "pss_bytes": totals["Pss"]}
    return {"num_workers": len(pids), "weights_bytes": weights_bytes, **sizes}


def run(
    *,
    model: str = "shapes",
    devices: str | None = None,
    num_steps: int = 12,
    repeats: int = 5,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run both comparisons and return `{"host", "commit", "command", "rows"}`. Raises ValueError for bad input."""
    workers = parse_devices(devices)
    num_threads = len(workers)
    report(f"degree 1 on {num_threads} threads, beside diffusers")
    rows = asyncio.run(compare_with_diffusers(model, num_threads, num_steps, repeats))
    report(f"{len(workers)} one-thread workers, degree by degree")
    degree_rows, weights = asyncio.run(compare_degrees(model, len(workers), num_steps, repeats))
    line = f"tetrion bench step --devices cpu:{len(workers)} --num-steps {num_steps} --repeats {repeats}"
    return make_record(line, rows + degree_rows) | {"weights": weights}


def command(
    *,
    devices: str | None = None,
    model: str | None = None,
    num_steps: int = 12,
    repeats: int = 5,
    output: Path | None = None,
    as_json: bool = False,
) -> dict[str, Any]:
    """What `tetrion bench step` does: measure, print the table (or one JSON object), write `output`."""
    result = run(
        model=model or "shapes",
        devices=devices,
        num_steps=num_steps,
        repeats=repeats,
        report=lambda text: print(text, file=sys.stderr, flush=True),
    )
    text = write_record(result, output)
    print(text if as_json else table(result))
    return result


def table(result: dict[str, Any]) -> str:
    """The rows as text for people."""
    lines = [f"{'system':<14}{'px':>6}{'degree':>8}{'threads':>9}{'ms':>12}{'ratio':>8}"]
    for row in result["rows"]:
        lines.append(
            f"{row['system']:<14}{row['px']:>6}{row['degree']:>8}{row['threads']:>9}{row['ms']:>12.1f}{row['ratio']:>8.3f}"
        )
    weights = result["weights"]
    if weights["pss_bytes"] is not None:
        rss, pss = weights["rss_bytes"] / 1e6, weights["pss_bytes"] / 1e6
        lines.append(
            f"weights {weights['weights_bytes'] / 1e6:.1f} MB, mapped by {weights['num_workers']} workers:"
            f" resident {rss:.1f} MB counted per worker, {pss:.1f} MB counted once (proportional set size)"
        )
    return "\n".join(lines)
