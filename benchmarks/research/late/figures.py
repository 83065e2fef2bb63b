"""From runs to the figures of a row: attainment, latency and lateness, of all requests, by class, by tenant."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.research.late.runs import RunResult
from tetrion.entrypoints.bench.workloads import Trace, TraceRequest

Row = dict[str, Any]
RIVALS = ("edf", "tetriserve-continuous")
"""Latencies are compared with the better of these."""
COLUMNS = ("n", "met", "mean_s", "p50_s", "p99_s", "late_p99_s", "late_worst_s", "device_s", "refused")
"""The figures of `_of`, as results have them."""
PARTS: dict[str, Callable[[TraceRequest], str]] = {
    "class": lambda request: f"{request.width}x{request.height}",
    "tenant": lambda request: request.tenant,
    "steps": lambda request: f"{request.num_steps} steps",
    "slo": lambda request: "without SLO" if request.slo_s is None else "with SLO",
}


def figures(traces: Sequence[Trace], runs: Sequence[RunResult]) -> Row:
    """Pooled over `runs` of the seeds' `traces`. Attainment in percent; `by_seed`: of each. Parts of which there is
    only one are left out; where only some requests state an SLO, there is a part for each class with and without."""
    rows = [row for trace, run in zip(traces, runs, strict=True) for row in _requests(trace, run)]
    made = _of(rows) | {
        "by_seed": [_of(_requests(trace, run))["met"] for trace, run in zip(traces, runs, strict=True)],
        "cpu_s": _round(np.mean([run.cpu_s for run in runs])),
        "plan_ms": _round(np.mean([run.decision_ms[0] for run in runs])),
    }
    parts = dict(PARTS)
    if len({PARTS["slo"](request) for request, *_ in rows}) > 1:
        parts["class"] = lambda request: f"{PARTS['class'](request)} {PARTS['slo'](request)}"
    for part, name_of in parts.items():
        names = sorted({name_of(request) for request, *_ in rows}, key=lambda name: (len(name), name))
        if len(names) > 1:
            made[f"by_{part}"] = {name: _of([row for row in rows if name_of(row[0]) == name]) for name in names}
    return made


Request = tuple[TraceRequest, float | None, float, bool]
"""Request, latency, device seconds, whether it was refused."""


def _requests(trace: Trace, run: RunResult) -> list[Request]:
    refused = set(run.refused)
    return [
        (request, None if end_s is None else end_s - request.arrival_s, spent_s, number in refused)
        for number, (request, end_s, spent_s) in enumerate(zip(trace, run.finished_s, run.device_s, strict=True))
    ]


def _of(rows: Sequence[Request]) -> Row:
    """`met`: percent of those with an SLO; `late_p99_s`, `late_worst_s`: by how much those that missed theirs did."""
    latencies_s = np.array([latency_s for _, latency_s, *_ in rows if latency_s is not None])
    timed = [(request.slo_s, latency_s) for request, latency_s, *_ in rows if request.slo_s is not None]
    met = [latency_s is not None and latency_s <= slo_s for slo_s, latency_s in timed]
    late_s = np.array([latency_s - slo_s for slo_s, latency_s in timed if latency_s is not None and latency_s > slo_s])
    return {
        "n": len(rows),
        "met": _round(100 * np.mean(met), 4) if met else None,
        "mean_s": _round(latencies_s.mean()) if latencies_s.size else None,
        "p50_s": _percentile(latencies_s, 50),
        "p99_s": _percentile(latencies_s, 99),
        "late_p99_s": _percentile(late_s, 99),
        "late_worst_s": _round(late_s.max()) if late_s.size else None,
        "device_s": _round(sum(spent_s for *_, spent_s, _ in rows), 4),
        "refused": sum(was_refused for *_, was_refused in rows),
    }


def better(of: dict[str, Row], figure: str = "p99_s", *, within: tuple[str, str] | None = None) -> float | None:
    """The least of a figure among the `RIVALS` in `of` (policy -> figures of one point), `within` a part of it."""
    found = [of[rival] for rival in RIVALS if rival in of]
    if within is not None:
        found = [row[within[0]][within[1]] for row in found]
    return min((row[figure] for row in found if row[figure] is not None), default=None)


def geometric_mean(values: Iterable[float]) -> float | None:
    logs = [float(np.log(value)) for value in values]
    return float(np.exp(np.mean(logs))) if logs else None


def _percentile(values: np.ndarray, percent: float) -> float | None:
    return _round(np.percentile(values, percent)) if values.size else None


def _round(value: float, digits: int = 3) -> float:
    return float(f"{float(value):.{digits}g}")
