"""What `tetrion recommend` shows: text for people, and time against energy as PNG (needs matplotlib)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tetrion.entrypoints.plotting import import_matplotlib, save
from tetrion.entrypoints.recommend.choice import Configuration, Recommendation

COLOURS = {1: "#0072b2", 2: "#009e73", 4: "#e69f00", 8: "#d55e00"}
OTHER = "#6c757d"


def table(advice: Recommendation) -> str:
    """The frontier and the choice as text."""
    first = advice.choice
    at = "mean" if advice.percentile is None else f"p{advice.percentile:g}"
    lines = [
        f"{first.model} on {first.gpu or 'these GPUs'}, {first.width}x{first.height}, {first.num_steps} steps:"
        f" least energy with {at} latency within {advice.deadline_s:g} s",
        f"{'':<2}{'latency s':>10}{'J/image':>10}{'± %':>7}  configuration",
    ]
    for c in advice.frontier:
        mark = "→ " if c is first or c == first else "  "
        half = "–" if c.ci95 is None else f"{50 * (c.ci95[1] - c.ci95[0]) / c.joules_per_image:.1f}"
        seconds = c.at_percentile(advice.percentile) or 0.0
        lines.append(f"{mark}{seconds:>10.2f}{c.joules_per_image:>10.0f}{half:>7}  {c.text}")
    lines.append(
        f"{first.text}: {first.joules_per_image:.0f} J a picture, {advice.choice_latency_s:.2f} s;"
        f" {advice.saved_j:.0f} J ({100 * advice.saved_share:.1f} %) below the fastest ({advice.fastest.text})"
    )
    lines.append(f"confidence: {advice.confidence}; {advice.note}")
    return "\n".join(lines)


def draw(configurations: Sequence[Configuration], advice: Recommendation, path: Path) -> None:
    """Every configuration, the frontier, the deadline and the choice. Raises InputError without matplotlib."""
    import_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    for num_gpus in sorted({c.num_gpus for c in configurations}):
        _points(axes, [c for c in configurations if c.num_gpus == num_gpus], advice.percentile, num_gpus)
    line = [(c.at_percentile(advice.percentile), c.joules_per_image) for c in advice.frontier]
    axes.plot(
        *zip(*line, strict=True), color="#333333", linewidth=1.2, drawstyle="steps-post", zorder=2, label="frontier"
    )
    axes.axvline(advice.deadline_s, color="#cc79a7", linestyle="--", linewidth=1.3, label="deadline")
    choice = advice.choice
    here = (advice.choice_latency_s, choice.joules_per_image)
    axes.plot(*here, "o", markersize=15, markerfacecolor="none", markeredgecolor="black", markeredgewidth=1.6, zorder=5)
    # Below the frontier, where there is nothing; on the side with room.
    is_right = advice.choice_latency_s > _middle([c.latency_s for c in configurations])
    axes.annotate(
        f"{choice.text}\n{choice.joules_per_image:.0f} J, {advice.choice_latency_s:.2f} s",
        here,
        xytext=(-20 if is_right else 20, -62),
        textcoords="offset points",
        ha="right" if is_right else "left",
        arrowprops={"arrowstyle": "-", "color": "#555555"},
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2},
        zorder=6,
    )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_xlabel("latency (s)" if advice.percentile is None else f"p{advice.percentile:g} latency (s)")
    axes.set_ylabel("joules a picture")
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    axes.set_title(f"{choice.model}, {choice.width}x{choice.height}, {choice.num_steps} steps, {choice.gpu}")
    axes.grid(color="#e8e8e8", linewidth=0.7)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=6)
    save(figure, path)


def _points(axes: Any, configurations: Sequence[Configuration], percentile: float | None, num_gpus: int) -> None:
    known = [c for c in configurations if c.at_percentile(percentile) is not None]
    x = [c.at_percentile(percentile) for c in known]
    y = [c.joules_per_image for c in known]
    colour = COLOURS.get(num_gpus, OTHER)
    label = f"{num_gpus} GPU" + ("s" if num_gpus > 1 else "")
    axes.scatter(x, y, s=26, color=colour, label=label, zorder=3)
    for c, seconds in zip(known, x, strict=True):
        if c.ci95 is not None:
            axes.plot([seconds] * 2, c.ci95, color=colour, linewidth=1.4, zorder=3)


def _middle(values: Sequence[float]) -> float:
    """The geometric middle of a logarithmic axis."""
    return (min(values) * max(values)) ** 0.5
