"""Timelines of recorded runs: the picture and the trace."""

import json
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from PIL import Image

from tests.entrypoints.bench.conftest import recorded, small_disk
from tetrion.entrypoints.bench.recording import write_recordings
from tetrion.entrypoints.bench.timeline import command
from tetrion.entrypoints.errors import InputError


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    write_recordings(tmp_path / "r.jsonl", recorded(("horizon", "fixed-2")))
    return tmp_path / "r.jsonl"


def colours(path: Path) -> set[tuple[int, int, int]]:
    with Image.open(path) as image:
        found = image.convert("RGB").getcolors(1 << 24)
    assert found is not None
    return {colour for count, colour in found if count > 200}  # type: ignore[misc]


def test_the_picture_shows_the_window_that_was_asked_for(recordings: Path, tmp_path: Path) -> None:
    command(recordings=recordings, png=tmp_path / "busy.png", from_s=0.0, to_s=15.0)
    command(recordings=recordings, png=tmp_path / "after.png", from_s=1e5, to_s=1e5 + 15.0)
    busy, after = colours(tmp_path / "busy.png"), colours(tmp_path / "after.png")
    assert len(busy - after) >= 3


def test_the_trace_has_every_chunk_on_every_member_and_every_request(recordings: Path, tmp_path: Path) -> None:
    command(recordings=recordings, number=2, chrome_trace=tmp_path / "t.json")
    document = json.loads((tmp_path / "t.json").read_text())
    recording = recorded(("fixed-2",))[0]
    slices = [event for event in document["traceEvents"] if event["ph"] == "X"]
    assert document["otherData"]["policy"] == "fixed-2"
    assert len(slices) == sum(len(chunk.members) for chunk in recording.chunks)
    assert sum(event["dur"] for event in slices) == pytest.approx(1e6 * (recording.run.gpu_s or 0))
    phases = Counter(event["ph"] for event in document["traceEvents"] if event.get("cat") == "request")
    assert phases["b"] == phases["e"] == 25
    assert phases["n"] == sum(not outcome.is_met for outcome in recording.run.outcomes)


@pytest.mark.parametrize(("option", "name"), [("png", "t.png"), ("chrome_trace", "t.json")])
def test_on_a_full_disk_what_was_there_stays(recordings: Path, tmp_path: Path, option: str, name: str) -> None:
    path = tmp_path / "new" / name
    command(recordings=recordings, **{option: path})  # type: ignore[arg-type]
    before = path.read_bytes()
    with small_disk(), pytest.raises(OSError, match="File too large"):
        command(recordings=recordings, number=2, **{option: path})  # type: ignore[arg-type]
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "give --png, --chrome-trace or both"),
        ({"png": Path("x.svg")}, "png: must be the name of a PNG file"),
        ({"number": 3, "png": Path("x.png")}, "run: must be from 1 to 2, got 3"),
        ({"from_s": 5.0, "to_s": 4.0, "png": Path("x.png")}, "to: must be after 5, got 4"),
    ],
)
def test_bad_input_is_one_line(recordings: Path, options: dict[str, object], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        command(recordings=recordings, **options)  # type: ignore[arg-type]


def test_without_matplotlib_it_says_what_to_install(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"plots: need matplotlib; install it with pip install matplotlib"):
        command(recordings=recordings, png=tmp_path / "x.png")
    command(recordings=recordings, chrome_trace=tmp_path / "t.json")


def test_a_run_whose_first_request_comes_late_is_drawn_from_there(recordings: Path, tmp_path: Path) -> None:
    (recording,) = recorded(("horizon",))
    late_s = 500.0
    outcomes = tuple(
        msgspec.structs.replace(
            outcome,
            request=msgspec.structs.replace(outcome.request, arrival_s=outcome.request.arrival_s + late_s),
            finished_s=None if outcome.finished_s is None else outcome.finished_s + late_s,
        )
        for outcome in recording.run.outcomes
    )
    chunks = tuple(
        msgspec.structs.replace(chunk, start_s=chunk.start_s + late_s, end_s=chunk.end_s + late_s)
        for chunk in recording.chunks
    )
    run = msgspec.structs.replace(recording.run, outcomes=outcomes, end_s=recording.run.end_s + late_s)
    write_recordings(tmp_path / "late.jsonl", [msgspec.structs.replace(recording, run=run, chunks=chunks)])
    command(recordings=tmp_path / "late.jsonl", png=tmp_path / "late.png")
    command(recordings=tmp_path / "late.jsonl", png=tmp_path / "empty.png", from_s=0.0)
    command(recordings=recordings, png=tmp_path / "early.png")
    late, empty, early = (colours(tmp_path / f"{name}.png") for name in ("late", "empty", "early"))
    assert len(late & early - empty) >= 3
