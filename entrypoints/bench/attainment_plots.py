"""`tetrion bench plot`: attainment against SLO scale and against rate, a line for each policy; what tenants got.

From rows of `tetrion bench slo`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tetrion.entrypoints.bench.slo_statistics import Row
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.plotting import import_matplotlib, save

OURS = "horizon"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5539", "#6c757d")
"""Okabe and Ito's, told apart by colour-blind readers too. The first is ours."""
MARKERS = "osD^vP*X"
MAX_TENANT_POINTS = 4
AXES = {"slo_scale": "SLO scale (×)", "rate_per_min": "arrivals per minute"}
"""What attainment is drawn against; the other of the two is fixed in a panel."""


def command(results: Sequence[Path], output: Path) -> None:
    """Draw the rows of all files together. Raises InputError for a file that is not a result."""
    rows: list[Row] = []
    for path in results:
        try:
            rows += json.loads(path.read_text())["rows"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: not a result of tetrion bench slo") from None
    paths = draw_attainment(rows, output)
    if not paths:
        raise InputError("plot: no policy has two SLO scales or two rates with deadlines, or tenants; nothing to draw")
    print("\n".join(map(str, paths)))


def draw_attainment(rows: Sequence[Row], folder: Path) -> list[Path]:
    """`attainment-slo-scale.png` and `attainment-rate.png`, as far as there are two values to draw a line through, and
    `tenants.png` if there are some (see `draw_tenants`).

    A panel for each mix, number of devices, mode and value of the other axis. Returns the files written.
    """
    matplotlib = import_matplotlib()
    known = [row for row in rows if row["attainment"] is not None and row["rate_per_min"] is not None]
    written = []
    for axis, other in (("slo_scale", "rate_per_min"), ("rate_per_min", "slo_scale")):
        panels = _panels(known, axis, other)
        if panels:
            written.append(folder / f"attainment-{axis.removesuffix('_per_min').replace('_', '-')}.png")
            save(_figure(matplotlib, panels, axis), written[-1])
    points: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        if row.get("by_tenant"):  # results of older versions have none
            rate = "" if row["rate_per_min"] is None else f", {row['rate_per_min']:.3g}/min"
            title = f"{row['mix']}{rate}, SLO ×{row['slo_scale']:g}, {row['devices']} devices"
            points.setdefault(title, {})[row["policy"]] = row["by_tenant"]
    if points:
        written.append(folder / "tenants.png")
        draw_tenants(points, written[-1])
    return written


def draw_tenants(points: dict[str, dict[str, dict[str, Row]]], path: Path) -> None:
    """`points`: title -> policy -> tenant -> its figures, of which `attainment` and its share of the `device_s` of all
    are drawn: two panels for each of the first `MAX_TENANT_POINTS`, a group of bars for each policy."""
    import_matplotlib()
    from matplotlib.figure import Figure

    shown = dict(list(points.items())[:MAX_TENANT_POINTS])
    figure = Figure(figsize=(4.2 * len(shown) + 0.8, 4.6), layout="constrained")
    panels = figure.subplots(2, len(shown), squeeze=False, sharey="row", sharex="col")
    tenants = list(dict.fromkeys(name for policies in shown.values() for of in policies.values() for name in of))
    for column, (title, policies) in enumerate(shown.items()):
        for row, share_of in enumerate((_attained, _device_share)):
            axes, width = panels[row][column], 0.8 / len(tenants)
            for i, tenant in enumerate(tenants):
                at = [place + (i - (len(tenants) - 1) / 2) * width for place in range(len(policies))]
                axes.bar(at, [share_of(of, tenant) for of in policies.values()], width, color=COLOURS[i % len(COLOURS)])
            axes.set_xticks(range(len(policies)), list(policies), rotation=20, ha="right", fontsize=8)
            axes.set_ylim(0, 105)
        panels[0][column].set_title(title, fontsize=9)
    panels[0][0].set_ylabel("deadlines met (%)")
    panels[1][0].set_ylabel("device time (%)")
    figure.legend(panels[0][0].containers, [name or "no tenant" for name in tenants], loc="outside right upper")
    save(figure, path)


def _attained(of: dict[str, Row], tenant: str) -> float:
    return 100 * (of.get(tenant, {}).get("attainment") or 0.0)


def _device_share(of: dict[str, Row], tenant: str) -> float:
    total_s = sum(figures["device_s"] or 0.0 for figures in of.values())
    return 100 * (of.get(tenant, {}).get("device_s") or 0.0) / total_s if total_s else 0.0


def _panels(rows: Sequence[Row], axis: str, other: str) -> dict[str, list[Row]]:
    """Title -> rows, for panels with at least two values of `axis`."""
    panels: dict[str, list[Row]] = {}
    for row in sorted(
        rows, key=lambda row: (row["mode"], row["devices"], row["mix"] != "uniform", row["mix"], row[other])
    ):
        fixed = f"SLO ×{row[other]:g}" if other == "slo_scale" else f"{row[other]:.3g}/min"
        live = " live" if row["mode"] == "live" else ""
        panels.setdefault(f"{row['mix']}, {fixed}, {row['devices']} devices{live}", []).append(row)
    return {title: found for title, found in panels.items() if len({row[axis] for row in found}) > 1}


def _figure(matplotlib: Any, panels: dict[str, list[Row]], axis: str) -> Any:
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    num_rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns + 0.6, 3.3 * num_rows + 0.9), layout="constrained")
    grid = figure.subplots(num_rows, columns, squeeze=False, sharey=True)
    style = _styles(list(dict.fromkeys(row["policy"] for found in panels.values() for row in found)))
    handles: dict[str, Any] = {}
    for i, (axes, (title, found)) in enumerate(zip(grid.flat, panels.items(), strict=False)):
        handles |= _draw_panel(axes, found, axis, style)
        axes.set_title(title)
        axes.set_xlabel(AXES[axis])
        if i % columns == 0:
            axes.set_ylabel("deadlines met (%)")
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)))
    return figure


def _styles(policies: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Ours thick and on top, the others in their order."""
    ordered = sorted(policies, key=lambda policy: policy != OURS)
    return {
        policy: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linewidth": 2.6 if policy == OURS else 1.5,
            "markersize": 6 if policy == OURS else 5,
            "zorder": 4 if policy == OURS else 3,
        }
        for i, policy in enumerate(ordered)
    }


def _draw_panel(axes: Any, rows: Sequence[Row], axis: str, style: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A line with its 95 % band for each policy, the bound as a dashed one. Returns the legend's handles."""
    handles = {}
    for policy, look in style.items():
        found = sorted((row for row in rows if row["policy"] == policy), key=lambda row: row[axis])
        if found:
            x = [row[axis] for row in found]
            (handles[policy],) = axes.plot(x, [100 * row["attainment"] for row in found], **look)
            low, high = ([100 * row["ci95"][end] for row in found] for end in (0, 1))
            axes.fill_between(x, low, high, color=look["color"], alpha=0.09, linewidth=0)
    bounds = sorted({(row[axis], 100 * row["bound"]) for row in rows if row["bound"] is not None})
    if bounds:
        (handles["possible at most (bound)"],) = axes.plot(*zip(*bounds, strict=True), "k--", linewidth=1.3, zorder=5)
    ticks = sorted({row[axis] for row in rows})
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.set_ylim(0, 102)
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    return handles
