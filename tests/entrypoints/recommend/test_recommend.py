"""`tetrion recommend`: known answers of the published table, and what is claimed when."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrion.entrypoints.recommend.choice import Configuration, NothingInTime, frontier, recommend
from tetrion.entrypoints.recommend.command import parse_seconds
from tetrion.entrypoints.recommend.sources import read_source, select

Tetrion = Callable[..., int]


def configuration(joules: float, seconds: float, **changes: Any) -> Configuration:
    fields = {
        "system": "s",
        "model": "m",
        "gpu": "g",
        "width": 1024,
        "height": 1024,
        "num_steps": 50,
        "num_gpus": 1,
        "ulysses_degree": 1,
        "batch": 1,
        "joules_per_image": joules,
        "latency_s": seconds,
    }
    return Configuration(**(fields | changes))


@pytest.mark.parametrize(
    ("deadline_s", "expected"),
    [(5, (4, 4, 1, 9621)), (10, (2, 2, 1, 8699)), (30, (1, 1, 2, 7866))],
)
def test_the_published_tables_known_answers(deadline_s: float, expected: tuple[int, int, int, int]) -> None:
    rows = select(read_source(None), model="FLUX.1-dev", gpu="H100")
    advice = recommend(rows, deadline_s)
    choice = advice.choice
    assert (choice.num_gpus, choice.ulysses_degree, choice.batch, round(choice.joules_per_image)) == expected
    assert not advice.is_claimed and advice.confidence == "unknown"


def test_the_published_fastest_is_what_savings_are_counted_against() -> None:
    advice = recommend(select(read_source(None), model="FLUX.1-dev", gpu="H100"), 10)
    assert round(advice.fastest.joules_per_image) == 9621
    assert advice.saved_j == pytest.approx(9620.549 - 8699.108)


configurations = st.lists(
    st.builds(configuration, st.floats(1, 1e5), st.floats(0.01, 1e3), num_gpus=st.integers(1, 8)),
    min_size=1,
    max_size=20,
)


@given(configurations, st.floats(0.01, 1e3))
def test_nothing_in_time_takes_less_and_the_frontier_is_beaten_by_nobody(
    measured: list[Configuration], deadline_s: float
) -> None:
    for c in frontier(measured):
        assert not any(
            other.latency_s <= c.latency_s and other.joules_per_image < c.joules_per_image for other in measured
        )
    try:
        advice = recommend(measured, deadline_s)
    except NothingInTime:
        assert all(c.latency_s > deadline_s for c in measured)
        return
    assert advice.choice.latency_s <= deadline_s
    assert all(c.joules_per_image >= advice.choice.joules_per_image for c in measured if c.latency_s <= deadline_s)
    assert advice.saved_j >= 0


@pytest.mark.parametrize(("cheap_ci", "is_claimed"), [((95.0, 105.0), True), ((95.0, 196.0), False)])
def test_a_saving_is_claimed_only_where_intervals_are_apart(cheap_ci: tuple[float, float], is_claimed: bool) -> None:
    cheap = configuration(100.0, 8.0, ci95=cheap_ci)
    fast = configuration(200.0, 4.0, ci95=(195.0, 205.0))
    advice = recommend([cheap, fast], 10.0)
    assert advice.choice == cheap
    assert advice.is_claimed is is_claimed


def test_a_percentile_counts_single_pictures_and_needs_them() -> None:
    steady = configuration(300.0, 3.0, latencies_s=(3.0,) * 20)
    wavering = configuration(200.0, 3.0, latencies_s=(2.0,) * 15 + (6.0,) * 5)
    unknown = configuration(100.0, 3.0)
    assert recommend([steady, wavering, unknown], 4.0).choice == unknown
    assert recommend([steady, wavering, unknown], 4.0, percentile=50).choice == wavering
    assert recommend([steady, wavering, unknown], 4.0, percentile=95).choice == steady
    with pytest.raises(ValueError, match="latencies of single pictures"):
        recommend([unknown], 4.0, percentile=95)


def test_no_more_gpus_than_allowed() -> None:
    wide, narrow = configuration(100.0, 1.0, num_gpus=4), configuration(150.0, 2.0)
    assert recommend([wide, narrow], 5.0).choice == wide
    assert recommend([wide, narrow], 5.0, max_gpus=2).choice == narrow


ROW = {
    "system": "tetrion",
    "model": "m",
    "px": "512x256",
    "steps": 4,
    "devices": 2,
    "degree": 2,
    "batch": 1,
    "joules_per_image": 50.0,
    "ci95": [49.0, 51.0],
    "latency_s": 2.0,
    "watts": 100.0,
    "idle_watts": 20.0,
}
OPEN_LOOP = ROW | {"system": "tetrion open loop", "degree": None, "joules_per_image": 9.0, "ci95": None, "latency_s": 1}


def write_result(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text(json.dumps({"host": {"gpus": [{"name": "G"}]}, "rows": rows}))


def test_results_of_the_benchmark_are_read(tmp_path: Path, tetrion: Tetrion, capsys: Any) -> None:
    rows = [ROW, ROW | {"degree": 1, "joules_per_image": None, "ci95": None}]
    record = {"host": {"gpus": [{"name": "G"}]}, "rows": rows, "details": [{"latencies_s": [1.9, 2.1]}, {}]}
    (tmp_path / "energy.json").write_text(json.dumps(record))
    (tmp_path / "ring.json").write_text('{"rows": [{"other": 1}]}')
    assert tetrion("recommend", tmp_path, "--deadline", "2200ms", "--percentile", 95, "--json") == 0
    advice = json.loads(capsys.readouterr().out)
    assert advice["num_considered"] == 1
    assert advice["choice"]["width"] == 512 and advice["choice"]["ulysses_degree"] == 2


def test_an_open_loop_is_no_configuration(tmp_path: Path, tetrion: Tetrion, capsys: Any) -> None:
    """Its row would be both fastest and cheapest here."""
    write_result(tmp_path / "loop.json", OPEN_LOOP, OPEN_LOOP | {"px": None, "steps": None})
    for source in (tmp_path, tmp_path / "loop.json"):
        assert tetrion("recommend", source, "--deadline", 5) == 2
        assert "loop.json: has only rows without a degree: those of an open loop" in capsys.readouterr().err
    write_result(tmp_path / "sweep.json", ROW)
    write_result(tmp_path / "both.json", OPEN_LOOP, ROW | {"degree": 1})
    assert tetrion("recommend", tmp_path, "--deadline", 5, "--json") == 0
    advice = json.loads(capsys.readouterr().out)
    assert advice["num_considered"] == 2
    assert {c["ulysses_degree"] for c in (advice["choice"], advice["fastest"])} <= {1, 2}


def test_a_source_with_nothing_in_it_says_so(tmp_path: Path, tetrion: Tetrion, capsys: Any) -> None:
    def complaint(source: Path) -> str:
        assert tetrion("recommend", source, "--deadline", 5) == 2
        told = capsys.readouterr()
        assert not told.out
        return str(told.err)

    (tmp_path / "ring.json").write_text('{"rows": [{"other": 1}]}')
    assert f"source: {tmp_path}: has no result of tetrion bench energy" in complaint(tmp_path)
    assert "not a result of tetrion bench energy" in complaint(tmp_path / "ring.json")
    write_result(tmp_path / "unmetered.json", ROW | {"joules_per_image": None})
    assert "unmetered.json: has no row with joules" in complaint(tmp_path)
    for name in ("bad.csv", "bad.json"):
        (tmp_path / name).write_bytes(b"model_id\n\xff\xfe")
        assert f"{name}': it is not UTF-8 text" in complaint(tmp_path / name)
    (tmp_path / "empty.csv").write_text("model_id,gpu_model\n")
    assert "empty.csv: has no row" in complaint(tmp_path / "empty.csv")
    (tmp_path / "long.csv").write_text("model_id\n" + "x" * 200_000)
    assert "long.csv: line" in complaint(tmp_path / "long.csv")


def test_a_picture_is_a_png_or_nothing_is_computed(tmp_path: Path, tetrion: Tetrion, capsys: Any) -> None:
    for name in ("x.abc", "x"):
        assert tetrion("recommend", "/does/not/exist.json", "--deadline", 5, "--png", tmp_path / "new" / name) == 2
        assert "png: must be the name of a PNG file, which ends in .png" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_prints_and_draws(tmp_path: Path, tetrion: Tetrion, capsys: Any) -> None:
    picture = tmp_path / "frontier.png"
    arguments = ("recommend", "--deadline", "10s", "--model", "FLUX.1-dev", "--gpu", "H100")
    assert tetrion(*arguments, "--png", picture) == 0
    assert "→       8.18      8699" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--deadline", "0.1", "--model", "FLUX.1-dev", "--gpu", "H100"), "the fastest takes 4.65 s"),
        (("--deadline", "5"), "model: say which"),
        (("--deadline", "5", "--model", "none"), "model: nothing was measured for 'none', there are "),
        (("--deadline", "5", "--model", "none"), "black-forest-labs/FLUX.1-dev, "),
        (("--deadline", "5", "--model", "FLUX.1-dev", "--gpu", "A100"), "gpu: nothing was measured for 'A100', there"),
        (("--deadline", "5", "--gpu", "H100", "--size", "64x64"), "size: nothing was measured for '64x64', there are"),
        (("--deadline", "5", "--num-steps", "3"), "num-steps: nothing was measured for '3', there are 2"),
        (("--deadline", "5", "--percentile", "nan"), "'--percentile': nan is not in the range 1<=x<=100"),
        (("--deadline", "soon"), "expected seconds"),
        (("/does/not/exist.json", "--deadline", "5"), "cannot read"),
    ],
)
def test_what_is_wrong_is_said(tetrion: Tetrion, capsys: Any, arguments: tuple[str, ...], complaint: str) -> None:
    assert tetrion("recommend", *arguments) == 2
    assert complaint in capsys.readouterr().err


def test_seconds_have_units() -> None:
    assert [parse_seconds(text) for text in ("5", "5s", "800ms", "0.5s")] == [5.0, 5.0, 0.8, 0.5]
