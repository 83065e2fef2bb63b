"""The round timeline: a picture of what every device did when, in a recorded run.

Two panels over one time axis. Above, a line for each request from arrival to finish, with its deadline. Below, a row
for each device; every chunk of a request is one block over the rows of its members.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tetrion.entrypoints.bench.outcomes import Chunk, Outcome
from tetrion.entrypoints.bench.recording import Recording
from tetrion.entrypoints.plotting import import_matplotlib, save

SHADES = {
    0: ("#9ecae1", "#4292c6", "#6baed6", "#2171b5"),
    1: ("#a1d99b", "#41ab5d", "#74c476", "#238b45"),
    2: ("#fdd0a2", "#f16913", "#fdae6b", "#d94801"),
    3: ("#dadaeb", "#807dba", "#bcbddc", "#6a51a3"),
    4: ("#fcbba1", "#ef3b2c", "#fc9272", "#cb181d"),
}
"""A hue for each size, from the smallest; neighbours among its requests differ in shade."""
MET, MISSED = "#2b8a3e", "#c92a2a"
HATCHES = {"encode": "////", "decode": "xxxx"}
INCHES_PER_S = 0.62


def draw_timeline(recording: Recording, path: Path, from_s: float, to_s: float) -> None:
    """Write the picture of `from_s` to `to_s` as PNG. Raises InputError without matplotlib."""
    import_matplotlib()
    from matplotlib.figure import Figure

    shown = _shown(recording, from_s, to_s)
    num_devices = recording.run.num_devices
    lanes = _lanes(recording.run.outcomes, shown)
    num_lanes = max(lanes.values(), default=0) + 1
    heights = [0.17 * num_lanes + 0.3, 0.34 * num_devices + 0.3]
    figure = Figure(
        figsize=(min(24.0, max(11.0, INCHES_PER_S * (to_s - from_s) + 2)), sum(heights) + 1.6),
        layout="constrained",
    )
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=heights)
    colours = _colours(recording.run.outcomes)
    for request, lane in lanes.items():
        _draw_request(above, request, recording.run.outcomes[request], lane, colours[request])
    visible = [chunk for chunk in recording.chunks if chunk.end_s >= from_s and chunk.start_s <= to_s]
    for chunk in visible:
        _draw_chunk(below, chunk, colours[chunk.request])
    _draw_labels(below, visible, colours, from_s, to_s)
    _finish_axes(above, below, recording, num_lanes, from_s, to_s)
    _legend(figure, recording, colours)
    save(figure, path)


def _shown(recording: Recording, from_s: float, to_s: float) -> list[int]:
    """Requests that are in the system at some time of the window."""
    end_s = recording.run.end_s
    return [
        number
        for number, outcome in enumerate(recording.run.outcomes)
        if outcome.request.arrival_s <= to_s and (end_s if outcome.finished_s is None else outcome.finished_s) >= from_s
    ]


def _lanes(outcomes: Sequence[Outcome], shown: Sequence[int]) -> dict[int, int]:
    """Request -> line: the first that is free from its arrival to its finish and deadline."""
    free_from_s: list[float] = []
    lanes = {}
    for number in shown:
        arrival_s = outcomes[number].request.arrival_s
        lane = next((i for i, free_s in enumerate(free_from_s) if free_s <= arrival_s), len(free_from_s))
        if lane == len(free_from_s):
            free_from_s.append(0.0)
        lanes[number] = lane
        free_from_s[lane] = _last_s(outcomes[number]) + 0.35
    return lanes


def _last_s(outcome: Outcome) -> float:
    """The last moment that is drawn of a request."""
    request = outcome.request
    deadline_s = request.arrival_s + (request.slo_s or 0.0)
    return max(deadline_s, outcome.finished_s or deadline_s)


def _colours(outcomes: Sequence[Outcome]) -> list[str]:
    sizes = _sizes(outcomes)
    shades = {size: itertools.cycle(SHADES[i % len(SHADES)]) for i, size in enumerate(sizes)}
    return [next(shades[outcome.request.width, outcome.request.height]) for outcome in outcomes]


def _sizes(outcomes: Sequence[Outcome]) -> list[tuple[int, int]]:
    found = {(outcome.request.width, outcome.request.height) for outcome in outcomes}
    return sorted(found, key=lambda size: (size[0] * size[1], size))


def _draw_request(axes: Any, number: int, outcome: Outcome, lane: int, colour: str) -> None:
    arrival_s, finished_s = outcome.request.arrival_s, outcome.finished_s
    deadline_s = None if outcome.request.slo_s is None else arrival_s + outcome.request.slo_s
    verdict = MET if outcome.is_met else MISSED
    if finished_s is not None:
        axes.plot([arrival_s, finished_s], [lane, lane], color=colour, linewidth=5, solid_capstyle="butt", zorder=2)
        if deadline_s is not None and finished_s > deadline_s:
            axes.plot([deadline_s, finished_s], [lane, lane], color=MISSED, linewidth=1.4, zorder=3)
    if deadline_s is not None:
        axes.plot([arrival_s, deadline_s], [lane, lane], color="#adb5bd", linewidth=0.8, zorder=1)
        axes.plot([deadline_s], [lane], marker="|", markersize=10, markeredgewidth=2.2, color=verdict, zorder=4)
    axes.text(arrival_s - 0.04, lane, f"{number}", ha="right", va="center", fontsize=6.5, color="#495057", clip_on=True)


def _draw_chunk(axes: Any, chunk: Chunk, colour: str) -> None:
    from matplotlib.patches import Rectangle

    for first, count in _runs(chunk.members):
        axes.add_patch(
            Rectangle(
                (chunk.start_s, first - 0.46),
                chunk.end_s - chunk.start_s,
                count - 0.08,
                facecolor=colour,
                edgecolor="white" if not chunk.failed else MISSED,
                linewidth=0.5,
                hatch=HATCHES.get(chunk.stage),
            )
        )


def _draw_labels(axes: Any, chunks: Sequence[Chunk], colours: Sequence[str], from_s: float, to_s: float) -> None:
    """Number and degree of a request, once on each stretch of chunks with the same members."""
    for (request, members), start_s, end_s in _stretches(chunks, (to_s - from_s) / 100):
        start_s, end_s = max(start_s, from_s), min(end_s, to_s)
        first, count = max(_runs(members), key=lambda run: run[1])
        share = (end_s - start_s) / (to_s - from_s)
        if share > 1 / 160:
            axes.text(
                (start_s + end_s) / 2,
                first + (count - 1) / 2,
                f"{request} (×{len(members)})" if share > 1 / 28 else f"{request}",
                ha="center",
                va="center",
                fontsize=7.5,
                color="white" if _is_dark(colours[request]) else "black",
                rotation=0 if share > 1 / 70 else 90,
                clip_on=True,
            )


def _stretches(
    chunks: Sequence[Chunk], largest_gap_s: float
) -> Iterator[tuple[tuple[int, tuple[int, ...]], float, float]]:
    """((request, members), start, end) of denoising chunks that follow one another on the same members."""
    open_since: dict[tuple[int, tuple[int, ...]], tuple[float, float]] = {}
    for chunk in sorted(chunks, key=lambda chunk: chunk.start_s):
        if chunk.stage != "denoise":
            continue
        key = (chunk.request, tuple(sorted(chunk.members)))
        start_s, end_s = open_since.get(key, (chunk.start_s, chunk.start_s))
        if chunk.start_s - end_s > largest_gap_s:
            yield key, start_s, end_s
            start_s = chunk.start_s
        open_since[key] = (start_s, chunk.end_s)
    for key, (start_s, end_s) in open_since.items():
        yield key, start_s, end_s


def _is_dark(colour: str) -> bool:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue < 140


def _runs(members: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, how many) of each run of neighbouring devices among `members`."""
    for _, run in itertools.groupby(enumerate(sorted(members)), key=lambda pair: pair[1] - pair[0]):
        devices = [device for _, device in run]
        yield devices[0], len(devices)


def _finish_axes(above: Any, below: Any, recording: Recording, num_lanes: int, from_s: float, to_s: float) -> None:
    rate = "" if recording.rate_per_min is None else f" {recording.rate_per_min:.3g}/min,"
    kind = "live" if recording.mode == "live" else "simulated"
    verdicts = [outcome.is_met for outcome in recording.run.outcomes if outcome.is_met is not None]
    above.set_title(
        f"{recording.policy}: {recording.mix},{rate} SLO ×{recording.slo_scale:g}, {kind};"
        f" {sum(verdicts)} of {len(verdicts)} deadlines met in the whole run",
        loc="left",
    )
    above.set_ylim(num_lanes - 0.4, -0.6)
    above.set_yticks([])
    above.set_ylabel("requests")
    above.spines["left"].set_visible(False)
    below.set_xlim(from_s, to_s)
    below.set_ylim(recording.run.num_devices - 0.4, -0.6)
    names = recording.facts.get("devices") or [f"GPU {i}" for i in range(recording.run.num_devices)]
    below.set_yticks(range(recording.run.num_devices), names)
    below.set_xlabel("seconds")
    for axes in (above, below):
        axes.grid(axis="x", color="#e9ecef", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)


def _legend(figure: Any, recording: Recording, colours: Sequence[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    sizes = _sizes(recording.run.outcomes)
    handles: list[Any] = [
        Patch(facecolor=SHADES[i % len(SHADES)][1], label=f"{width}×{height}")
        for i, (width, height) in enumerate(sizes)
    ]
    handles += [
        Patch(facecolor="#868e96", edgecolor="white", hatch=HATCHES["encode"], label="text encode"),
        Patch(facecolor="#868e96", edgecolor="white", hatch=HATCHES["decode"], label="decode"),
        Line2D([], [], color=MET, marker="|", markersize=11, markeredgewidth=2.2, linestyle="", label="deadline, met"),
        Line2D([], [], color=MISSED, marker="|", markersize=11, markeredgewidth=2.2, linestyle="", label="missed"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), columnspacing=1.4)
