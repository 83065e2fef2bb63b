"""From the outcomes of simulated or live runs to the figures of one row. Knows no policy, prints nothing."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tetrion.engine.planning.cost.tables import CostTables
from tetrion.entrypoints.bench.outcomes import Outcome, Run
from tetrion.entrypoints.bench.workloads import Size, class_name

Row = dict[str, Any]
CONFIDENCE_Z = 1.959964
NUM_RESAMPLES = 1000
MAX_BLOCK = 20


def summarise(runs: Sequence[Run]) -> tuple[Row, Row]:
    """The measured fields of a row, pooled over `runs` (same point, other seeds), and the diagnostics beside it.

    `idle_while_runnable`: share of the device time that was idle beside a request that could have run, but for what the
    policy `held_on_purpose` (see `LoopFigures`).
    """
    outcomes = [outcome for run in runs for outcome in run.outcomes]
    latencies_s = np.array([outcome.latency_s for outcome in outcomes if outcome.latency_s is not None])
    loops = [run.loop for run in runs if run.loop is not None]
    decision_ms = 1e3 * np.concatenate([np.array(run.decision_s) for run in runs])
    row: Row = {
        "requests": len(outcomes),
        "attainment": attainment(outcomes),
        "ci95": attainment_interval([run.outcomes for run in runs]),
        "attainment_by_class": attainment_by_class(outcomes),
        "by_tenant": by_tenant(outcomes),
        "refused": sum(outcome.refused for outcome in outcomes),
        "mean_s": float(latencies_s.mean()) if latencies_s.size else None,
        "p50_s": _percentile(latencies_s, 50),
        "p95_s": _percentile(latencies_s, 95),
        "p99_s": _percentile(latencies_s, 99),
        "gpu_s_per_image": _per_image([run.gpu_s for run in runs], latencies_s.size),
    }
    diagnostics: Row = {
        "attainment_by_seed": [attainment(run.outcomes) for run in runs],
        "weighted_attainment": attainment(outcomes, weighted=True),
        "num_failed": len(outcomes) - latencies_s.size - row["refused"],
        "worst_lateness_s": worst_lateness_s(outcomes),
        "utilisation": _mean([run.utilisation for run in runs]),
        "idle_while_runnable": _mean([loop.lost_share for loop in loops]),
        "held_on_purpose": _mean([loop.held_s / loop.device_s for loop in loops if loop.device_s]),
        "engine_cpu_ms_per_command": _mean([1e3 * loop.cpu_s_per_command for loop in loops]),
        "max_lag_ms": 1e3 * max(run.max_lag_s for run in runs),
        "num_decisions": int(decision_ms.size),
        "decision_ms": {
            "mean": float(decision_ms.mean()) if decision_ms.size else None,
            "p50": _percentile(decision_ms, 50),
            "p99": _percentile(decision_ms, 99),
            "max": float(decision_ms.max()) if decision_ms.size else None,
        },
    }
    return row, diagnostics


def attainment(outcomes: Sequence[Outcome], *, weighted: bool = False) -> float | None:
    """Share of the requests with an SLO that finished by their deadline; failed ones count as missed. None if no
    request has an SLO."""
    with_slo = [(o.request.weight if weighted else 1.0, bool(o.is_met)) for o in outcomes if o.is_met is not None]
    total = sum(weight for weight, _ in with_slo)
    return sum(weight for weight, met in with_slo if met) / total if with_slo else None


def attainment_by_class(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """Attainment of each model's sizes, by area."""
    found: dict[tuple[str, Size], list[Outcome]] = {}
    for outcome in outcomes:
        request = outcome.request
        found.setdefault((request.model, (request.width, request.height)), []).append(outcome)
    classes = sorted(found, key=lambda one: (one[0], one[1][0] * one[1][1], one[1]))
    return {class_name(*one): attainment(found[one]) for one in classes}


def by_tenant(outcomes: Sequence[Outcome]) -> dict[str, Row]:
    """What each tenant's requests got; empty if none of them has a tenant. `device_s`: None where not known."""
    names = sorted({outcome.request.tenant for outcome in outcomes})
    if names in ([], [""]):
        return {}
    return {name: _of_tenant([outcome for outcome in outcomes if outcome.request.tenant == name]) for name in names}


def _of_tenant(outcomes: Sequence[Outcome]) -> Row:
    latencies_s = np.array([outcome.latency_s for outcome in outcomes if outcome.latency_s is not None])
    spent_s = [outcome.gpu_s for outcome in outcomes]
    return {
        "requests": len(outcomes),
        "attainment": attainment(outcomes),
        "refused": sum(outcome.refused for outcome in outcomes),
        "mean_s": float(latencies_s.mean()) if latencies_s.size else None,
        "p99_s": _percentile(latencies_s, 99),
        "device_s": None if None in spent_s else sum(filter(None, spent_s)),
    }


def worst_lateness_s(outcomes: Sequence[Outcome]) -> float | None:
    """Seconds by which the latest request that was not refused missed its deadline; 0 if none did; None if one of them
    never finished or none has an SLO."""
    late = [(o.latency_s, o.request.slo_s) for o in outcomes if o.request.slo_s is not None and not o.refused]
    if not late or any(latency_s is None for latency_s, _ in late):
        return None
    return max(0.0, *(latency_s - slo_s for latency_s, slo_s in late if latency_s is not None))


def attainment_interval(runs: Sequence[Sequence[Outcome]]) -> tuple[float, float] | None:
    """A 95 % interval for attainment: the hull of Wilson's interval and of a bootstrap over blocks of neighbours.

    Neighbours in a trace meet or miss together, which the blocks respect and Wilson's interval does not; Wilson's has a
    width where every request of the sample is met. Deterministic.
    """
    met = [np.array([bool(o.is_met) for o in outcomes if o.is_met is not None], float) for outcomes in runs]
    blocks = [block for run in met if run.size for block in _blocks(run)]
    if not blocks:
        return None
    low, high = wilson_interval(int(sum(block.sum() for block in blocks)), sum(block.size for block in blocks))
    shares = _resample(blocks)
    return min(low, float(np.percentile(shares, 2.5))), max(high, float(np.percentile(shares, 97.5)))


def wilson_interval(num_met: int, num: int) -> tuple[float, float]:
    """Wilson's 95 % score interval for `num_met` of `num` independent requests."""
    share, z2 = num_met / num, CONFIDENCE_Z**2
    centre = (share + z2 / (2 * num)) / (1 + z2 / num)
    half = CONFIDENCE_Z / (1 + z2 / num) * math.sqrt(share * (1 - share) / num + z2 / (4 * num * num))
    return max(0.0, centre - half), min(1.0, centre + half)


def difference(runs: Sequence[Run], others: Sequence[Run]) -> tuple[float, tuple[float, float]] | None:
    """Attainment of `runs` minus that of `others` on the same traces, and its 95 % interval by a bootstrap over blocks
    of neighbouring requests, each request paired with itself. None if no request has an SLO. Deterministic."""
    blocks = []
    for run, other in zip(runs, others, strict=True):
        pairs = zip(run.outcomes, other.outcomes, strict=True)
        changes = [float(bool(a.is_met)) - float(bool(b.is_met)) for a, b in pairs if a.is_met is not None]
        blocks += _blocks(np.array(changes)) if changes else []
    if not blocks:
        return None
    shares = _resample(blocks)
    mean = float(np.concatenate(blocks).mean())
    return mean, (float(np.percentile(shares, 2.5)), float(np.percentile(shares, 97.5)))


def predicted_joules(runs: Sequence[Run], tables: CostTables) -> float | None:
    """Joules per picture of the denoising steps, as the tables' `step_j` have them; None where one is missing."""
    total, num = 0.0, 0
    for outcome in (outcome for run in runs for outcome in run.outcomes if outcome.finished_s is not None):
        known = tables.profiles[outcome.request.model].measured(outcome.request.cost_key)
        if known is None or any(degree not in known.step_j for degree in outcome.degrees):
            return None
        total, num = total + sum(known.step_j[degree] for degree in outcome.degrees), num + 1
    return total / num if num else None


def metered_joules(runs: Sequence[Run]) -> float | None:
    """Joules per finished picture by its receipt; None if any of them was not metered."""
    metered = [joules for run in runs for joules in run.joules]
    known = [joules for joules in metered if joules is not None]
    return sum(known) / len(known) if known and len(known) == len(metered) else None


def _resample(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """Means over `NUM_RESAMPLES` draws of as many blocks, with replacement."""
    sums, sizes = np.array([block.sum() for block in blocks]), np.array([block.size for block in blocks])
    chosen = np.random.default_rng(0).integers(0, len(blocks), (NUM_RESAMPLES, len(blocks)))
    return sums[chosen].sum(axis=1) / sizes[chosen].sum(axis=1)


def _blocks(met: np.ndarray) -> list[np.ndarray]:
    """Consecutive blocks of up to `MAX_BLOCK` requests, at least five of them where there are that many requests."""
    return np.array_split(met, max(min(5, met.size), math.ceil(met.size / MAX_BLOCK)))


def _percentile(values: np.ndarray, percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values.size else None


def _per_image(totals: Sequence[float | None], num_images: int) -> float | None:
    return None if None in totals or not num_images else sum(filter(None, totals)) / num_images


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
