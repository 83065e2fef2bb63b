"""The figures to reach, one by one: what was asked, what was found, whether that is reached.

Ratios of p99 are over the better of EDF's and continuous TetriServe's, other ratios over EDF's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.research.late.figures import RIVALS, Row, better, geometric_mean
from benchmarks.research.late.points import FLOODED, FLOODING, Point

OTHERS = ("edf", "tetriserve-continuous", "edf-best-fit")
LARGE = "2048x2048"
SMALL = ("256x256", "512x512")
MOST_AT_LIGHT, MOST_BY_LOAD, STRICTER = 1.5, {0.6: 1.7, 0.8: 2.2}, 1.7


def criteria(found: Mapping[str, Mapping[str, Row]], points: Sequence[Point], ours: str, before: str) -> list[Row]:
    """`found`: name of a point -> policy -> figures (see `figures.py`). `reached` is None where runs are missing."""
    by_point = [(point, found[point.name]) for point in points if point.name in found]
    made: list[Row] = []

    def add(asked: str, value: float | None, is_reached: Callable[[float], bool], **more: Any) -> None:
        shown = None if value is None else float(f"{value:.4g}")
        made.append({"asked": asked, "found": shown, "reached": None if value is None else is_reached(value)} | more)

    mixes = [(point, of) for point, of in by_point if point.group == "mixes"]
    changes = {point.name: of[ours]["met"] - of[before]["met"] for point, of in mixes if {ours, before} <= of.keys()}
    _add_least(add, "mixes: attainment over the older horizon's, worst point ≥ −0.5", changes, -0.5)
    add("mixes: the same on average ≥ 0", _mean(changes.values()), lambda value: value >= 0)
    single = [(point, of) for point, of in by_point if point.group == "one class" and {ours, before} <= of.keys()]
    alone = {point.name: of[ours]["met"] - of[before]["met"] for point, of in single}
    _add_least(add, "one class near saturation: the same, worst ≥ −1", alone, -1.0)
    _add_least(add, "first at every point but the tenants': least lead ≥ 0", _leads(by_point, ours), 0.0)
    ratios = {point: ratio for point, of in mixes if (ratio := p99_ratio(of, ours))}
    light = {point.name: ratio for point, ratio in ratios.items() if point.load == 0.4}
    _add_most(add, f"p99 at load .4, worst point ≤ {MOST_AT_LIGHT}", light, MOST_AT_LIGHT)
    for load, most in MOST_BY_LOAD.items():
        mean = geometric_mean(ratio for point, ratio in ratios.items() if point.load == load)
        add(f"p99 at load {load:g}, geometric mean ≤ {most}", mean, lambda value, most=most: value <= most)
    for name in sorted({name for _, of in mixes for name in of if name.startswith(f"{ours}:")}):
        heavy = (ratio for point, of in mixes if point.load == 0.8 and (ratio := p99_ratio(of, name)))
        cost = _mean(of[name]["met"] - of[ours]["met"] for _, of in mixes if {name, ours} <= of.keys())
        add(f"{name}: p99 at load .8, geometric mean ≤ {STRICTER}", geometric_mean(heavy), lambda v: v <= STRICTER)
        add(f"{name}: attainment over {ours}'s ≥ −1", cost, lambda value: value >= -1)
    for point, of in by_point:
        if ours in of and "edf" in of:
            _judge_special(add, point, of, ours)
    return made


def _leads(by_point: Sequence[tuple[Point, Mapping[str, Row]]], ours: str) -> dict[str, float]:
    """Attainment over the best other policy's."""
    leads = {}
    for point, of in by_point:
        others = [of[name]["met"] for name in OTHERS if name in of]
        if ours in of and others and point.group != "tenants":
            leads[point.name] = of[ours]["met"] - max(others)
    return leads


def _judge_special(add: Callable[..., None], point: Point, of: Mapping[str, Row], ours: str) -> None:
    """What is asked of one point."""
    where, edf, own = f"{point.devices} devices", of["edf"], of[ours]

    def mean_s(row: Row, name: str) -> float:
        value: float = row["by_class"][name]["mean_s"]
        return value

    if point.group == "giants":
        ratio = mean_s(own, LARGE) / mean_s(edf, LARGE)
        add(f"giants, {where}: time of 2048² over EDF's ≤ 1.3", ratio, lambda value: value <= 1.3)
    elif point.group == "unstated giant":
        names = [f"{size} with SLO" for size in SMALL]
        ratios = [own["by_class"][name]["p99_s"] / edf["by_class"][name]["p99_s"] for name in names]
        asked = f"4096² without SLO, {where}: p99 of small ones over EDF's, of the worse size ≤ 2"
        add(asked, max(ratios), lambda value: value <= 2)
    elif point.group == "stated":
        stated, unstated = f"{LARGE} with SLO", f"{LARGE} without SLO"
        where = f"{point.name.partition(',')[0]}, {where}"
        apart = mean_s(own, stated) / mean_s(own, unstated)
        add(f"2048² at 1.1, {where}: mean with SLO over without ≤ 1.2", apart, lambda value: value <= 1.2)
        for name, most in ((unstated, 1.5), (stated, 2.0)):
            ratio = mean_s(own, name) / mean_s(edf, name)
            add(f"{name} at 1.1, {where}: mean over EDF's ≤ {most}", ratio, lambda value, most=most: value <= most)
    elif point.group == "tenants":
        tenants = {name: row["met"] for name, row in own["by_tenant"].items()}
        asked = f"flood, {where}: {FLOODED} meets ≥ 90 %"
        add(asked, tenants[FLOODED], lambda value: value >= 90, others=tenants[FLOODING], total=own["met"])


def p99_ratio(of: Mapping[str, Row], policy: str) -> float | None:
    """Over the better rival's; None where one of them is missing."""
    rival = better(dict(of)) if all(name in of for name in RIVALS) else None
    return of[policy]["p99_s"] / rival if rival and policy in of else None


def by_load(found: Mapping[str, Mapping[str, Row]], points: Sequence[Point], policies: Sequence[str]) -> Iterator[Row]:
    """Of the mixes at each load: means of attainment, geometric means of p99 and of its ratio, of every policy."""
    for load in sorted({point.load for point in points if point.group == "mixes"}):
        for policy in policies:
            rows = [
                found[p.name]
                for p in points
                if p.group == "mixes" and p.load == load and policy in found.get(p.name, {})
            ]
            if rows:
                ratios = [ratio for of in rows if (ratio := p99_ratio(of, policy)) is not None]
                yield {
                    "load": load,
                    "policy": policy,
                    "points": len(rows),
                    "met": _short(_mean(of[policy]["met"] for of in rows)),
                    "p99_s": _short(geometric_mean(of[policy]["p99_s"] for of in rows)),
                    "p99_ratio": _short(geometric_mean(ratios)),
                    "mean_s": _short(geometric_mean(of[policy]["mean_s"] for of in rows)),
                }


def _add_least(add: Callable[..., None], asked: str, values: Mapping[str, float], least: float) -> None:
    where = min(values, key=values.__getitem__, default=None)
    add(asked, None if where is None else values[where], lambda value: value >= least - 1e-9, at=where, of=len(values))


def _add_most(add: Callable[..., None], asked: str, values: Mapping[str, float], most: float) -> None:
    where = max(values, key=values.__getitem__, default=None)
    add(asked, None if where is None else values[where], lambda value: value <= most, at=where, of=len(values))


def _mean(values: Any) -> float | None:
    known = list(values)
    return float(np.mean(known)) if known else None


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
