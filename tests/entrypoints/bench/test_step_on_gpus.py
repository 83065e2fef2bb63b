"""The GPU benchmark, rehearsed on CPU workers: every section, what a failure leaves, the budget, the picture."""

from pathlib import Path
from typing import Any

import pytest

from tetrion.engine.config import EngineConfig, parse_devices
from tetrion.engine.messages import Denoised
from tetrion.engine.model_spec import read_model_spec
from tetrion.engine.models.locate import resolve_model
from tetrion.entrypoints.bench.step_on_gpus import StepBench, StepOptions, table
from tetrion.entrypoints.bench.step_picture import draw_steps
from tetrion.entrypoints.bench.step_points import gaps_between


def rehearse(devices: str = "cpu:2", **changes: Any) -> dict[str, Any]:
    given = {
        "sizes": ((128, 128),),
        "degrees": (1, 2),
        "systems": ("tetrion", "floor"),
        "num_steps": 2,
        "seconds": 0.05,
    }
    spec, record = read_model_spec(resolve_model("shapes")), {"rows": []}
    saved: list[int] = []
    config = EngineConfig(devices=devices, num_threads=1)
    bench = StepBench(
        config,
        spec,
        parse_devices(devices),
        StepOptions(**(given | changes)),
        record,
        lambda: saved.append(len(record["rows"])),
    )
    bench.run()
    assert saved[-1] == len(record["rows"]) and len(saved) >= len(record["rows"])
    return record


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return rehearse()


@pytest.mark.timeout(400)
def test_steps_stand_beside_the_floor_of_their_degree(record: dict[str, Any]) -> None:
    rows = record["rows"]
    assert [(row["system"], row["degree"]) for row in rows] == [(s, d) for d in (1, 2) for s in ("tetrion", "floor")]
    for row in rows:
        assert row["px"] == 128 and row["ratio"] == row["ms"] / row["floor_ms"]
    assert rows[0]["floor_ms"] == rows[1]["ms"] != rows[3]["ms"]


def test_every_schedule_is_exact(record: dict[str, Any]) -> None:
    names = [row["schedule"] for row in record["exactness"]]
    assert names[:4] == ["degree 1", "degree 1, last devices", "degree 2", "degree 2, last devices"]
    assert len(names) == 7
    for row in record["exactness"]:
        assert row["bit_identical"] and row["max_difference"] == 0.0
        assert sum(steps for _, steps in row["chunks"]) == row["num_steps"] == 2


def test_resizing_and_gaps(record: dict[str, Any]) -> None:
    assert [row["groups"] for row in record["resizing"]] == [[[0], [1]], [[0], [0, 1]]]
    assert all(row["added_ms"] == row["ms"] - row["steady_ms"] for row in record["resizing"])
    assert [row["degree"] for row in record["idle_gaps"]] == [1, 2]
    text = table(record)
    assert "bit for bit" in text and "[0] ↔ [0, 1]" in text


@pytest.mark.timeout(400)
def test_what_cannot_run_is_a_row_with_the_reason() -> None:
    """Diffusers' context parallelism knows no CPU."""
    rows = rehearse(systems=("floor", "diffusers eager"), degrees=(2,))["rows"]
    assert [row["system"] for row in rows] == ["floor", "diffusers eager"]
    assert rows[1]["ms"] is None and rows[1]["ratio"] is None and rows[1]["floor_ms"] == rows[0]["ms"]
    assert rows[1]["reason"].startswith("rank ")


@pytest.mark.timeout(400)
def test_out_of_time() -> None:
    record = rehearse(systems=("tetrion", "diffusers eager"), budget_s=0.0)
    assert [(row["system"], row["ms"], row["reason"]) for row in record["rows"]] == [
        ("tetrion", None, "out of time"),
        ("tetrion", None, "out of time"),
        ("diffusers eager", None, "out of time"),
        ("diffusers eager", None, "out of time"),
    ]
    assert record["cut_short"] == "out of time" and "exactness" in record and record["exactness"] == []


def test_gaps_are_between_chunks_on_the_same_members() -> None:
    def chunk(command_id: int, device_id: int, started_s: float, ended_s: float) -> Denoised:
        return Denoised(
            command_id=command_id,
            device_id=device_id,
            request_id="1",
            step_index=command_id,
            started_s=started_s,
            ended_s=ended_s,
            waited_s=0.0,
        )

    chunks = [chunk(8, 1, 4.0, 5.0), chunk(8, 0, 4.0, 5.0), chunk(6, 0, 1.0, 2.0), chunk(6, 1, 1.0, 2.25)]
    chunks += [chunk(7, 0, 2.5, 3.75), chunk(7, 1, 2.5, 3.0), chunk(9, 1, 9.0, 10.0)]
    assert gaps_between(chunks) == [500.0, 1000.0]


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_on_a_gpu() -> None:
    record = rehearse(devices="cuda:0", degrees=(1,), systems=("tetrion", "floor", "diffusers eager"))
    assert [row["system"] for row in record["rows"]] == ["tetrion", "floor", "diffusers eager"]
    assert all(row["ms"] > 0 for row in record["rows"]), record["rows"]
    assert all(row["bit_identical"] for row in record["exactness"])


def test_the_picture_needs_a_time(tmp_path: Path) -> None:
    row = {"system": "tetrion", "px": 256, "degree": 1, "ms": None}
    assert not draw_steps([row], "title", tmp_path / "step.png") and not (tmp_path / "step.png").exists()
    rows = [row | {"ms": 4.0}, row | {"degree": 2, "ms": 3.0}, row | {"px": "512x256", "system": "floor", "ms": 1.0}]
    assert draw_steps(rows, "title", tmp_path / "step.png") and (tmp_path / "step.png").stat().st_size > 1000
