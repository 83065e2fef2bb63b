"""The GPU benchmark, rehearsed on CPU workers: every section, what a failure leaves, the budget, the picture."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tetrion.engine.config import EngineConfig, parse_devices
from tetrion.engine.families.locate import resolve_model
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.measure.probe import ChunkTimes
from tetrion.engine.messages import Denoised
from tetrion.entrypoints.bench import step_on_gpus
from tetrion.entrypoints.bench.step_on_gpus import StepBench, StepOptions
from tetrion.entrypoints.bench.step_picture import draw_steps
from tetrion.entrypoints.bench.step_points import gaps_between, split_steps
from tetrion.entrypoints.bench.step_record import StepRecord, read_record, table
from tetrion.entrypoints.errors import InputError

pytestmark = pytest.mark.usefixtures("fork_server")


def rehearse(devices: str = "cpu:2", record: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    given = {
        "sizes": ((128, 128),),
        "degrees": (1, 2),
        "systems": ("tetrion", "floor"),
        "num_steps": 2,
        "seconds": 0.05,
    }
    spec, record = read_model_spec(resolve_model("shapes")), {"rows": []} if record is None else record
    saved: list[int] = []
    config = EngineConfig(devices=devices, num_threads=1)
    bench = StepBench(
        config,
        spec,
        parse_devices(devices),
        StepOptions(**(given | changes)),
        StepRecord(record, lambda: saved.append(len(record["rows"]))),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_on_gpus, "RESIZE_STEPS", 6)
        bench.run()
    assert saved[-1] == len(record["rows"]) and len(saved) >= len(record["rows"])
    return record


@pytest.fixture(scope="module")
def record(fork_server: None) -> dict[str, Any]:
    return rehearse()


def test_steps_stand_beside_the_floor_of_their_degree(record: dict[str, Any]) -> None:
    rows = record["rows"]
    assert [(row["system"], row["degree"]) for row in rows] == [(s, d) for d in (1, 2) for s in ("floor", "tetrion")]
    for row in rows:
        assert row["px"] == 128 and row["ratio"] == row["ms"] / row["floor_ms"]
    assert rows[1]["floor_ms"] == rows[0]["ms"] != rows[2]["ms"]


def test_every_schedule_is_exact(record: dict[str, Any]) -> None:
    names = [row["schedule"] for row in record["exactness"]]
    assert names[:4] == ["degree 1", "degree 1, last devices", "degree 2", "degree 2, last devices"]
    assert len(names) == 7
    for row in record["exactness"]:
        assert row["bit_identical"] and row["max_difference"] == 0.0
        assert sum(steps for _, steps in row["chunks"]) == row["num_steps"] == 2


def test_resizing_and_gaps(record: dict[str, Any]) -> None:
    assert [row["groups"] for row in record["resizing"]] == [[[0], [1]], [[0], [0, 1]]]
    assert all(row["added_ms"] == row["between_ms"] - row["steady_between_ms"] for row in record["resizing"])
    assert all(isinstance(row["first_visit_ms"], float) for row in record["resizing"])
    assert [row["degree"] for row in record["idle_gaps"]] == [1, 2]
    text = table(record)
    assert record["exchange"] == "host memory" and "through host memory" in text
    assert "bit for bit" in text and "[0] ↔ [0, 1]" in text


def test_steps_and_what_lies_between_them() -> None:
    def chunk(entered_s: float, ended_s: float, net_s: float) -> ChunkTimes:
        return ChunkTimes(num_steps=1, started_s=entered_s, entered_s=entered_s, ended_s=ended_s, net_s=net_s)

    chunks = [chunk(0.0, 1.0, 1.0), chunk(1.5, 2.5, 1.0), chunk(2.625, 3.125, 0.5), chunk(3.25, 4.0, 0.75)]
    assert split_steps(chunks[:2], skipped=0) == (1000.0, 500.0)
    assert split_steps(chunks, skipped=1) == (625.0, 125.0)


def test_what_cannot_run_is_a_row_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpus_only.py").write_text("raise SystemExit('it knows no CPU')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    other = step_on_gpus.OtherSystem("gpus_only", "diffusers", False)
    monkeypatch.setitem(step_on_gpus.OTHERS, "diffusers eager", other)
    rows = rehearse(systems=("floor", "diffusers eager"), degrees=(2,))["rows"]
    assert [row["system"] for row in rows] == ["floor", "diffusers eager"]
    assert rows[1]["ms"] is None and rows[1]["ratio"] is None and rows[1]["floor_ms"] == rows[0]["ms"]
    assert rows[1]["reason"].startswith("rank ") and rows[1]["reason"].endswith("it knows no CPU")


def test_out_of_time() -> None:
    record = rehearse("cpu:1", degrees=(1,), systems=("tetrion", "diffusers eager"), budget_s=0.0)
    assert [(row["system"], row["ms"], row["reason"]) for row in record["rows"]] == [
        ("tetrion", None, "out of time"),
        ("diffusers eager", None, "out of time"),
    ]
    assert record["cut_short"] == "out of time" and record["exactness"] == []
    again = StepRecord(record, lambda: None)
    assert again.rows == [] and "cut_short" not in record  # all is measured anew


def test_going_on_measures_only_what_is_missing(record: dict[str, Any]) -> None:
    earlier = json.loads(json.dumps(record))
    earlier["finished"].remove("resizing 128")
    earlier["rows"] = earlier["rows"][:2]
    kept = json.loads(json.dumps(earlier))
    again = rehearse(record=earlier, systems=("tetrion",))
    assert again["rows"][:2] == kept["rows"] and [row["degree"] for row in again["rows"]] == [1, 1, 2]
    assert again["exactness"] == kept["exactness"] and again["idle_gaps"] == kept["idle_gaps"]
    assert len(again["resizing"]) == len(kept["resizing"]) and again["resizing"] != kept["resizing"]


def test_what_is_gone_on_with_is_of_this_machine(tmp_path: Path) -> None:
    path, host = tmp_path / "step.json", {"cpu": "a", "num_cores": 2, "torch": "2", "gpus": [{"uuid": "GPU-1"}]}
    path.write_text(json.dumps({"host": host | {"load_1min": 1.0}, "rows": []}))
    assert read_record(path, host)["rows"] == []
    with pytest.raises(InputError, match="another machine"):
        read_record(path, host | {"gpus": []})
    path.write_text("{")
    with pytest.raises(InputError, match="holds no record"):
        read_record(path, host)


def test_a_system_that_is_not_installed_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    other = step_on_gpus.OtherSystem("no.such.module", "no_such_package", False)
    monkeypatch.setitem(step_on_gpus.OTHERS, "xfuser eager", other)
    (row,) = rehearse(systems=("xfuser eager",), degrees=(1,))["rows"]
    assert row["ms"] is None and row["reason"] == "no_such_package is not installed"


def test_gaps_are_between_chunks_on_the_same_members() -> None:
    def chunk(command_id: int, device_id: int, started_s: float, ended_s: float) -> Denoised:
        return Denoised(
            command_id=command_id,
            device_id=device_id,
            request_id="1",
            step_index=command_id,
            started_s=started_s,
            ended_s=ended_s,
            waited_s=0.25,
        )

    chunks = [chunk(8, 1, 4.0, 5.0), chunk(8, 0, 4.0, 5.0), chunk(6, 0, 1.0, 2.0), chunk(6, 1, 1.0, 2.25)]
    chunks += [chunk(7, 0, 2.5, 3.75), chunk(7, 1, 2.5, 3.0), chunk(9, 1, 9.0, 10.0)]
    assert gaps_between(chunks) == [(500.0, 750.0), (1000.0, 1250.0)]


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    record = rehearse(devices="cuda:0", degrees=(1,), systems=("tetrion", "floor", "diffusers eager"))
    assert [row["system"] for row in record["rows"]] == ["floor", "tetrion", "diffusers eager"]
    assert all(row["ms"] > 0 for row in record["rows"]), record["rows"]
    assert all(row["bit_identical"] for row in record["exactness"])


def test_the_picture_needs_a_time(tmp_path: Path) -> None:
    row = {"system": "tetrion", "px": 256, "degree": 1, "ms": None}
    assert not draw_steps([row], "title", tmp_path / "step.png") and not (tmp_path / "step.png").exists()
    rows = [row | {"ms": 4.0}, row | {"degree": 2, "ms": 3.0}, row | {"px": "512x256", "system": "floor", "ms": 1.0}]
    assert draw_steps(rows, "title", tmp_path / "step.png") and (tmp_path / "step.png").stat().st_size > 1000
