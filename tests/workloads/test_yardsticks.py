"""The scripts that compare policies: at the points of a yardstick file, and live."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.proof.live import policies_on
from benchmarks.workloads import compare_policies
from benchmarks.workloads.compare_policies import load

COST = {"step_ms": {"1": 100.0, "2": 60.0}, "encode_ms": 25, "decode_ms": 100}
SIZES = ("256x256", "512x512", "1024x1024", "2048x2048")
POINT = {"devices": 2, "mix": "uniform", "slo_scale": 1.2, "seeds": [1]}
DATA = {
    "profile": {"heads": 24, "classes": dict.fromkeys(SIZES, COST)},
    "overheads": {"dispatch_ms_per_step": 0.3, "regroup_ms": 0.2},
    "trace": {"num_requests": 30, "num_steps": 10, "base_slo_s": {"2": [1.0, 1.0, 1.0, 1.0]}},
    "points": [
        POINT | {"rate_per_min": 40.0, "attainment": {"horizon": 0.5}},
        POINT | {"rate_per_min": 400.0, "attainment": {"horizon": 0.5}},
    ],
}


def compare(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, object]:
    (folder / "points.json").write_text(json.dumps(DATA))
    output = folder / "out.json"
    words = ["compare_policies", str(folder / "points.json"), "--seeds", "5", "--output", str(output), *options]
    monkeypatch.setattr(sys, "argv", words)
    compare_policies.main()
    found: dict[str, object] = json.loads(output.read_text())
    return found


def test_load_is_the_share_of_the_devices_time_at_the_narrowest_degree() -> None:
    assert load(DATA, DATA["points"][0]) == pytest.approx(40 / 60 * 1.125 / 2)  # type: ignore[index, arg-type]


def test_a_run_is_compared_with_what_is_recorded_and_goes_on_where_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(tmp_path, monkeypatch, "--budget-s", "0")["rows"] == []
    made = compare(tmp_path, monkeypatch)
    rows = made["rows"]
    assert isinstance(rows, list) and [row["rate_per_min"] for row in rows] == [40.0, 400.0]
    assert all(row["difference"] == pytest.approx(row["attainment"] - 0.5) for row in rows)
    assert rows[0]["requests"] == 30 and rows[0]["attainment"] > rows[1]["attainment"]
    capsys.readouterr()
    again = compare(tmp_path, monkeypatch)
    assert again["rows"] == rows and "load" not in capsys.readouterr().out


def test_the_bound_stands_beside_points_below_saturation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compare(tmp_path, monkeypatch, "--bound", "12")
    (row,) = made["rows"]  # type: ignore[misc]
    assert (row["rate_per_min"], row["requests"]) == (40.0, 12)
    assert row["to_bound"] == pytest.approx(row["bound"] - row["attainment"]) and row["to_bound"] >= 0
    assert made["summary"]["horizon"]["mean"] == row["to_bound"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("num_devices", "fixed"), [(1, ["fixed-1"]), (2, ["fixed-1", "fixed-2"]), (4, ["fixed-1", "fixed-2", "fixed-4"])]
)
def test_fixed_groups_are_compared_as_far_as_they_fit(num_devices: int, fixed: list[str]) -> None:
    assert policies_on(num_devices) == ["horizon", *fixed, "rssp", "tetriserve", "tetriserve-g1"]
