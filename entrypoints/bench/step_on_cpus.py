"""`tetrion bench step` on CPUs: what the engine adds to the model, and what a second worker brings.

Two comparisons, every pair interleaved (A B A B …) and compared by medians:

* one whole request at degree 1 through the engine beside diffusers' FluxPipeline: same weights, steps and threads;
* one-thread workers: a request's step time at each degree beside degree 1.
"""

import asyncio
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tetrion.engine.api import AsyncEngine
from tetrion.engine.config import EngineConfig
from tetrion.engine.measure.probe import PROMPT
from tetrion.engine.request import ImageRequest
from tetrion.entrypoints.bench.line_process import LineProcess
from tetrion.entrypoints.record import make_record

SIZES = (256, 512)
DIFFUSERS_TIMEOUT_S = 600.0
Row = dict[str, Any]


async def compare_with_diffusers(model: str, num_threads: int, num_steps: int, repeats: int) -> list[Row]:
    """Whole requests at degree 1: rows of systems `tetrion` and `diffusers`, milliseconds per request."""
    rows = []
    config = EngineConfig(models=(model,), devices="cpu:1", num_threads=num_threads)
    async with AsyncEngine(config) as engine:
        baseline = await LineProcess.start(
            "tetrion.entrypoints.bench.diffusers_baseline",
            *(engine.spec.path, str(num_threads), str(engine.spec.max_text_tokens)),
        )
        try:
            for px in (size for size in SIZES if size <= engine.spec.sizes.max):
                ours, theirs = [], []
                for seed in range(repeats + 1):
                    request = ImageRequest(prompt=PROMPT, width=px, height=px, num_steps=num_steps, seed=seed)
                    ours.append((await engine.generate(request)).latency_s)
                    job = {"px": px, "num_steps": num_steps, "seed": seed}
                    theirs.append((await baseline.ask(job, DIFFUSERS_TIMEOUT_S))["seconds"])
                common = {"px": px, "degree": 1, "num_steps": num_steps, "threads": num_threads, "floor_ms": None}
                baseline_ms = 1e3 * statistics.median(theirs[1:])
                rows.append({"system": "diffusers", "ms": baseline_ms, "ratio": 1.0, **common})
                ours_ms = 1e3 * statistics.median(ours[1:])
                rows.append({"system": "tetrion", "ms": ours_ms, "ratio": ours_ms / baseline_ms, **common})
        finally:
            await baseline.close()
    return rows


async def compare_degrees(model: str, num_workers: int, num_steps: int, repeats: int) -> tuple[list[Row], Row]:
    """Step times at each legal degree of one-thread workers: milliseconds per step, ratio to degree 1.

    Returns the rows, and what the workers' shared weights occupy.
    """
    rows: list[Row] = []
    config = EngineConfig(models=(model,), devices=f"cpu:{num_workers}", num_threads=1)
    async with AsyncEngine(config) as engine:
        degrees = engine.spec.legal_degrees(num_workers)
        for px in (size for size in SIZES if size <= engine.spec.sizes.max):
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
    command_line: str, *, model: str, num_workers: int, num_steps: int, repeats: int, report: Callable[[str], None]
) -> dict[str, Any]:
    """Both comparisons: `{"host", "commit", "command", "rows", "weights"}`."""
    report(f"degree 1 on {num_workers} threads, beside diffusers")
    rows = asyncio.run(compare_with_diffusers(model, num_workers, num_steps, repeats))
    report(f"{num_workers} one-thread workers, degree by degree")
    degree_rows, weights = asyncio.run(compare_degrees(model, num_workers, num_steps, repeats))
    return make_record(command_line, rows + degree_rows) | {"weights": weights}


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
