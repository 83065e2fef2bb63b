"""What the commands print and write; two of them for a few seconds, each on a server of its own."""

import json
from pathlib import Path
from typing import Any

import click
import pytest

from benchmarks.soak import chaos, commands, everything, fuzz_lines
from benchmarks.soak.report import at_most, finish, none_of
from benchmarks.soak.resume import Steps


def rows_of(record: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    return {row[key]: row for row in record["rows"]}


def test_chaos_kills_and_compares(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(chaos, "NUM_PICTURES", 2)
    output = tmp_path / "chaos.json"
    line = "chaos --minutes 0.08 --every-s 3.5 --undisturbed-s 2 --capacity-s 1 --workers 2 --output"
    commands.run([*line.split(), str(output)])
    record = json.loads(output.read_bytes())
    rows, checks = rows_of(record, "phase"), {check["name"]: check for check in record["checks"]}
    assert rows["undisturbed"]["right"] == rows["undisturbed"]["sent"]
    assert rows["kills"]["kills"] == rows["kills"]["counters"]["tetrion_worker_deaths_total"] >= 1
    assert rows["kills"]["right"] == rows["kills"]["sent"] and rows["after"]["right"] == 2
    assert all(checks[name]["holds"] for name in ("wrong", "lost", "5xx", "all workers back"))


def test_fuzz_sends_bodies_and_streams(tmp_path: Path) -> None:
    output = tmp_path / "fuzz.json"
    line = "fuzz --bodies 60 --streams 40 --lines 0 --seed 3 --first 500 --output"
    assert commands.run([*line.split(), str(output)]) == 0
    record = json.loads(output.read_bytes())
    rows = rows_of(record, "kind")
    assert rows["bodies"]["first"] == 500 and sum(rows["bodies"]["outcomes"].values()) == 60
    assert sum(rows["streams"]["outcomes"].values()) == 40 and len(rows["streams"]["outcomes"]) > 2
    assert record["host"] and record["command"].startswith("python -m benchmarks.soak fuzz --bodies 60")


@pytest.mark.parametrize("minutes", [2.0, 10.0, 60.0, 240.0])
def test_all_runs_commands_that_there_are_with_options_that_they_take(minutes: float) -> None:
    names = []
    for name, *options in everything.lines_for(minutes):
        command = commands.soak.commands[name]
        with click.Context(commands.soak) as parent:
            command.make_context(name, list(options), parent=parent)
        names.append(name)
    assert set(names) == set(commands.soak.commands) - {"all"}


def test_a_check_that_fails_is_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = none_of("wrong", 0), at_most("p99", 2.5, 2.0, " s")
    assert finish("soak x --a 1", [{"phase": "p"}], [good], tmp_path / "a.json") == 0
    assert finish("soak x", [], [good, bad], tmp_path / "b.json") == 1
    assert json.loads((tmp_path / "a.json").read_bytes())["command"] == "soak x --a 1"
    assert "FAILS  p99    2.5 (at most 2 s)" in capsys.readouterr().out
    assert not at_most("p99", None, 2.0).holds


def test_steps_that_a_request_is_set_back_add_up() -> None:
    seen = Steps()
    for step in (0, 2, 4, 4, 1, 3, 5, 4, 6):
        seen.reached(step)
    assert seen.num_repeated == 3 + 1


def test_good_lines_are_spread_and_the_manifest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    ids = fuzz_lines.write_lines(path, 1, range(120))
    lines = path.read_bytes().split(b"\n")
    assert ids == ["good-0", "good-50", "good-100"] and len(lines) == 120 + 3 + 1
    assert [json.loads(lines[at])["id"] for at in (0, 51, 102)] == ids
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_bytes(b'{"line": 1}\n{"li\n')
    assert fuzz_lines.read_manifest(manifest) == ([{"line": 1}], 1)
    assert fuzz_lines.read_manifest(tmp_path / "none") == ([], 0) and fuzz_lines.pixels_of(path) is None
