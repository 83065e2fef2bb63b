"""`tetrion bench timeline`: what every device did when, of a recorded run: a picture and a trace for Perfetto."""

from pathlib import Path

from tetrion.entrypoints.bench.chrome_trace import write_chrome_trace
from tetrion.entrypoints.bench.recording import Recording, read_recordings
from tetrion.entrypoints.bench.timeline_picture import draw_timeline
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.plotting import check_png
from tetrion.entrypoints.record import whole

DEFAULT_SPAN_S = 20.0
LEAD_S = 0.5


def command(
    *,
    recordings: Path,
    number: int = 1,
    from_s: float | None = None,
    to_s: float | None = None,
    png: Path | None = None,
    chrome_trace: Path | None = None,
) -> None:
    """Draw run `number` (from 1) of the file from `from_s` (the first arrival) to `to_s`, and write all of it as a
    trace.

    Raises InputError for what the caller can put right.
    """
    if png is None and chrome_trace is None:
        raise InputError("timeline: give --png, --chrome-trace or both")
    if png is not None:
        check_png(png, "png")
    try:
        runs = read_recordings(recordings)
    except ValueError as error:
        raise InputError(str(error)) from None
    if not 1 <= number <= len(runs):
        raise InputError(f"run: must be from 1 to {len(runs)}, got {number}")
    recording = runs[number - 1]
    from_s = _beginning_s(recording) if from_s is None else from_s
    end_s = from_s + DEFAULT_SPAN_S if to_s is None else to_s
    if end_s <= from_s:
        raise InputError(f"to: must be after {from_s:g}, got {end_s:g}")
    if png is not None:
        draw_timeline(recording, png, from_s, min(end_s, max(recording.run.end_s, from_s + 1.0)))
        print(png)
    if chrome_trace is not None:
        with whole(chrome_trace) as temporary:
            write_chrome_trace(recording, temporary)
        print(chrome_trace)


def _beginning_s(recording: Recording) -> float:
    """A little before the first request, which with few a minute may come late."""
    first_s = min((outcome.request.arrival_s for outcome in recording.run.outcomes), default=0.0)
    return max(0.0, first_s - LEAD_S)
