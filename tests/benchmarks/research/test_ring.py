import json
import sys
from pathlib import Path

import pytest

from benchmarks.research import ring


@pytest.fixture(autouse=True)
def spawned_processes_find_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).resolve().parents[3])])


def test_it_measures_every_way_and_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    result = ring.command(num_round_trips=30, num_after_silence=5)
    rows = {(row["transport"], row["silence_ms"]): row for row in result["rows"]}
    assert len(rows) == 6 and {silence_ms for _, silence_ms in rows} == {0.0, 5.0}
    assert all(0 < row["p50_us"] <= row["p99_us"] <= row["max_us"] for row in rows.values())
    assert rows["ring, poll", 0.0]["target_p50_us"] == 60 and rows["ring, poll", 5.0]["target_p99_us"] == 500
    printed = capsys.readouterr().out
    assert all(transport in printed for transport, _ in rows) and result["host"]["cpu"] in printed


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    result = ring.command(num_round_trips=3, num_after_silence=3, as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(result))


def test_percentiles_are_nearest_rank() -> None:
    values = [float(i) for i in range(1, 101)]
    assert (ring._percentile(values, 50), ring._percentile(values, 99)) == (50.0, 99.0)
    assert ring._percentile([3.0], 99) == 3.0


def test_counts_are_checked() -> None:
    with pytest.raises(ValueError, match="must be ≥ 1, got 0 and 5"):
        ring.run(num_round_trips=0, num_after_silence=5)
