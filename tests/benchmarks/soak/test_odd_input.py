"""A little of what `python -m benchmarks.soak` tries much of; a case is the same in every run."""

import random
from pathlib import Path

import pytest

from benchmarks.soak import cases
from benchmarks.soak.cases import outcome_of, run_cases
from benchmarks.soak.command_lines import CommandLines
from benchmarks.soak.damaged_checkpoints import Checkpoints


def test_damaged_checkpoints_are_taken_or_refused(tmp_path: Path) -> None:
    result = run_cases(Checkpoints(tmp_path).draw, 40, 7, 0, ("accepted", "exit 2"))
    assert result["faults"] == [] and result["outcomes"]["exit 2"] > result["outcomes"]["accepted"] > 0


def test_command_lines_end_as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run_cases(CommandLines(tmp_path).draw, 80, 7, 0, ("accepted", "exit 0", "exit 1", "exit 2"))
    assert result["faults"] == [] and sum(result["outcomes"].values()) == 80


def test_a_case_is_the_same_again(tmp_path: Path) -> None:
    checkpoints, lines = Checkpoints(tmp_path), CommandLines(tmp_path)
    for draw in (checkpoints.draw, lines.draw):
        assert draw(random.Random("1/5")) == draw(random.Random("1/5")) != draw(random.Random("1/6"))


def test_faults_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*_: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(cases.cli, "run", defect)
    result = run_cases(lambda _: ("a case", ()), 2, 1, 10, ("exit 2",))
    assert result["num_faults"] == 2 and result["faults"][1]["number"] == 11
    assert "ZeroDivisionError" in result["faults"][0]["said"]
    monkeypatch.setattr(cases.cli, "run", lambda *_: 2)
    assert outcome_of(())[0] == "exit 2, badly told"
