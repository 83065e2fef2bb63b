"""The picture of `tetrion bench step` on GPUs: step time against degree, a panel a size, a line a system."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tetrion.entrypoints.bench.attainment_plots import COLOURS, MARKERS
from tetrion.entrypoints.bench.step_record import pixels
from tetrion.entrypoints.plotting import import_matplotlib, save

COLUMNS = 4
Row = dict[str, Any]


def draw_steps(rows: Sequence[Row], title: str, path: Path) -> bool:
    """Both axes are logarithmic. False, and no file, if no row has a time. Raises InputError without matplotlib."""
    known = [row for row in rows if row["ms"] is not None]
    if not known:
        return False
    matplotlib = import_matplotlib()
    from matplotlib import pyplot

    sizes = sorted({row["px"] for row in known}, key=pixels)
    systems = list(dict.fromkeys(row["system"] for row in known))
    columns = min(COLUMNS, len(sizes))
    lines = -(-len(sizes) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(3.4 * columns, 3.4 * lines), squeeze=False)
    for panel in axes.flat[len(sizes) :]:
        panel.set_axis_off()
    for panel, px in zip(axes.flat, sizes, strict=False):
        for i, system in enumerate(systems):
            points = sorted((row["degree"], row["ms"]) for row in known if (row["px"], row["system"]) == (px, system))
            if points:
                style = {"color": "#333333", "linestyle": "--"} if system == "floor" else {"color": COLOURS[i % 8]}
                panel.plot(*zip(*points, strict=True), marker=MARKERS[i % 8], label=system, **style)
        degrees = sorted({row["degree"] for row in known})
        panel.set(xscale="log", yscale="log", title=f"{px}²" if isinstance(px, int) else px, xlabel="degree (GPUs)")
        panel.xaxis.set_major_locator(matplotlib.ticker.FixedLocator(degrees))
        panel.xaxis.set_major_formatter(matplotlib.ticker.FixedFormatter([str(degree) for degree in degrees]))
        panel.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        panel.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes[0][0].set_ylabel("ms a step")
    handles = {
        label: line for panel in axes.flat for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="upper center", ncols=len(handles), bbox_to_anchor=(0.5, 0.0))
    figure.suptitle(title)
    figure.tight_layout()
    save(figure, path)
    pyplot.close(figure)
    return True
