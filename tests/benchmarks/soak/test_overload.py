"""What an overload's figures say; the servers themselves are not started here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak.load import Answer
from benchmarks.soak.overload import HERE, PACKAGE, THERE, checks_of, importable, row_of
from tetrion.entrypoints.errors import InputError


def answers(*outcomes: tuple[str, float]) -> list[Answer]:
    return [
        Answer(number=number, due_s=float(number), latency_s=latency_s, outcome=outcome)
        for number, (outcome, latency_s) in enumerate(outcomes)
    ]


def test_a_row_counts_what_is_met_by_the_clients_clock() -> None:
    seen = answers(
        ("right", 1.0), ("right", 4.5), ("wrong", 1.0), ("lost", 120.0), ("429 deadline_unmeetable", 0.1),
        ("429 engine_overloaded", 0.1), ("503 queue_timeout", 9.0), ("500 generation_failed", 0.1),
    )  # fmt: skip
    row = row_of(HERE, 3.0, 18.0, 4000, seen)
    assert (row["sent"], row["met"], row["late"], row["refused"], row["timed_out"]) == (8, 1, 1, 2, 1)
    assert (row["wrong"], row["unanswered"], row["others"]) == (1, 1, {"500 generation_failed": 1})
    assert row["met_share"] == 0.125
    failing = {check.name for check in checks_of([row], [3.0], has_baseline=False) if not check.holds}
    assert failing == {"wrong", "admitted and not answered", "other errors"}


@pytest.mark.parametrize(("met", "holds"), [(2, True), (1, False)])
def test_rounds_are_summed_and_held_against_the_baselines(met: int, holds: bool) -> None:
    rows = [
        row_of(who, 3.0, 18.0, 4000, answers(*[("right", 1.0)] * count, *[("429 x", 0.0)] * (3 - count)))
        for who, count in ((THERE, 2), (HERE, 0), (HERE, met), (THERE, 0))
    ]
    (check,) = [check for check in checks_of(rows, [3.0], has_baseline=True) if "× 3" in check.name]
    assert check.holds is holds and check.figure == pytest.approx(met / 6)


def test_the_package_of_a_checkout_can_be_imported(tmp_path: Path) -> None:
    for name in PACKAGE:
        (tmp_path / name).mkdir()
    (tmp_path / "engine" / "which.py").write_text("print('the other one')")
    with importable(tmp_path) as path:
        line = [sys.executable, "-P", "-m", "tetrion.engine.which"]
        done = subprocess.run(line, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert done.stdout == "the other one\n"
    with pytest.raises(InputError, match="is no checkout, it has no configs"), importable(tmp_path / "x"):
        pass
