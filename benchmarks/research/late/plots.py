"""The pictures: attainment against p99 (the frontier), the ratio of p99 by load, and what a flood leaves to tenants."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.research.late.criteria import MOST_AT_LIGHT, MOST_BY_LOAD
from benchmarks.research.late.figures import Row
from tetrion.entrypoints.bench.attainment_plots import COLOURS, MARKERS, draw_tenants
from tetrion.entrypoints.plotting import import_matplotlib, save

DPI = 100
"""Small files."""
LOADS = (0.6, 0.8, 1.0)
"""Of the frontier, a panel each."""


def draw(loads: Sequence[Row], tenants: Mapping[str, Mapping[str, Row]], ours: str, folder: Path) -> list[Path]:
    """`loads`: rows of `criteria.by_load`; `tenants`: point -> policy -> figures, of points with tenants. Returns the
    files written."""
    matplotlib = import_matplotlib()
    styles = _styles([row["policy"] for row in loads], ours)
    paths = [folder / "late-frontier.png", folder / "late-by-load.png"]
    with matplotlib.rc_context({"savefig.dpi": DPI}):
        _frontier(loads, ours, styles, paths[0])
        _by_load(loads, styles, paths[1])
        if tenants:
            paths.append(folder / "late-tenants.png")
            draw_tenants({point: _by_tenant(policies) for point, policies in tenants.items()}, paths[-1])
    return paths


def _by_tenant(policies: Mapping[str, Row]) -> dict[str, dict[str, Row]]:
    """In the words of `draw_tenants`."""
    return {
        policy: {
            name: {"attainment": of["met"] and of["met"] / 100, "device_s": of["device_s"]}
            for name, of in row["by_tenant"].items()
        }
        for policy, row in policies.items()
    }


def _styles(policies: Sequence[str], ours: str) -> dict[str, dict[str, object]]:
    """Ours with its options in one colour, the others one each."""
    kinds = sorted({name.partition(":")[0] for name in policies}, key=lambda name: (name != ours, name))
    look = {kind: {"color": COLOURS[i], "marker": MARKERS[i]} for i, kind in enumerate(kinds)}
    return {name: look[name.partition(":")[0]] for name in policies}


def _frontier(loads: Sequence[Row], ours: str, styles: Mapping[str, dict[str, object]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    handles = {}
    for panel, load in zip(figure.subplots(1, len(LOADS)), LOADS, strict=True):
        rows = [row for row in loads if row["load"] == load]
        line = sorted((row for row in rows if row["policy"].partition(":")[0] == ours), key=lambda row: row["p99_s"])
        panel.plot([row["p99_s"] for row in line], [row["met"] for row in line], color=COLOURS[0], linewidth=1)
        for row in rows:
            size = 9 if row["policy"] == ours else 6
            handle = panel.plot(row["p99_s"], row["met"], linestyle="none", markersize=size, **styles[row["policy"]])
            kind, _, options = row["policy"].partition(":")
            handles.setdefault(kind, handle[0])
            beside = {"textcoords": "offset points", "xytext": (6, -9), "fontsize": 6.5}
            panel.annotate(options, (row["p99_s"], row["met"]), **beside)
        panel.set_title(f"load {load:g}")
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter("{x:g}")
        panel.tick_params(axis="x", which="both", labelsize=8)
        panel.set_xlabel("p99 (s, geometric mean)")
        panel.grid(color="#e3e3e3", linewidth=0.8)
    figure.axes[0].set_ylabel("deadlines met (%)")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5)
    save(figure, path)


def _by_load(loads: Sequence[Row], styles: Mapping[str, dict[str, object]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for policy, style in styles.items():
        rows = [row for row in loads if row["policy"] == policy and row["p99_ratio"] is not None]
        line = "--" if ":" in policy else "-"
        axes.plot([row["load"] for row in rows], [row["p99_ratio"] for row in rows], line, label=policy, **style)
    bounds = {0.4: MOST_AT_LIGHT} | MOST_BY_LOAD
    axes.plot(list(bounds), list(bounds.values()), "k_", markersize=22, label="at most")
    axes.axhline(1.0, color="#888888", linewidth=0.8)
    axes.set_yscale("log")
    ticks = (0.7, 1, 1.5, 2, 3, 5)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("load")
    axes.set_ylabel("p99 over the better of edf and\ntetriserve-continuous (geometric mean)")
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.8)
    axes.legend(fontsize=8)
    save(figure, path)
