"""Curves of attainment."""

import json
from pathlib import Path

import pytest

from tetrion.entrypoints.bench.attainment_plots import command, draw_attainment
from tetrion.entrypoints.errors import InputError


def row(policy: str, rate: float | None, slo_scale: float, attainment: float | None) -> dict[str, object]:
    return {
        "policy": policy,
        "mode": "sim",
        "devices": 8,
        "mix": "uniform",
        "rate_per_min": rate,
        "slo_scale": slo_scale,
        "attainment": attainment,
        "ci95": None if attainment is None else [attainment - 0.05, attainment + 0.05],
        "bound": 0.97,
    }


def test_a_figure_for_each_axis_with_two_values(tmp_path: Path) -> None:
    scales = [row("horizon", 12.0, scale, 0.9) for scale in (1.0, 1.5)]
    rates = [row("horizon", rate, 1.0, 0.8) for rate in (24.0, 48.0)]
    assert [path.name for path in draw_attainment(scales, tmp_path)] == ["attainment-slo-scale.png"]
    written = draw_attainment([*scales, *rates], tmp_path / "both")
    assert [path.name for path in written] == ["attainment-slo-scale.png", "attainment-rate.png"]
    assert all(path.stat().st_size > 10_000 for path in written)


def test_rows_without_deadline_or_rate_are_left_out(tmp_path: Path) -> None:
    assert draw_attainment([row("horizon", 12.0, s, None) for s in (1.0, 2.0)], tmp_path) == []
    assert draw_attainment([row("horizon", None, s, 0.5) for s in (1.0, 2.0)], tmp_path) == []


def test_tenants_have_a_picture_of_their_own(tmp_path: Path) -> None:
    got = {"A": {"attainment": 0.9, "device_s": 9.0}, "B": {"attainment": None, "device_s": None}}
    rows = [row(policy, None, 1.0, 0.9) | {"by_tenant": got} for policy in ("horizon", "edf")]
    assert [path.name for path in draw_attainment(rows, tmp_path)] == ["tenants.png"]
    assert (tmp_path / "tenants.png").stat().st_size > 5_000
    assert draw_attainment([row("horizon", None, 1.0, 0.9) | {"by_tenant": {}}], tmp_path / "none") == []


def test_results_of_several_runs_are_drawn_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, scale in enumerate((1.0, 1.5)):
        (tmp_path / f"{i}.json").write_text(json.dumps({"rows": [row("rssp", 12.0, scale, 0.5)]}))
    command([tmp_path / "0.json", tmp_path / "1.json"], tmp_path / "plots")
    assert capsys.readouterr().out.strip().endswith("attainment-slo-scale.png")
    with pytest.raises(InputError, match="nothing to draw"):
        command([tmp_path / "0.json"], tmp_path / "plots")
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(InputError, match=r"bad\.json: not a result"):
        command([tmp_path / "bad.json"], tmp_path)
