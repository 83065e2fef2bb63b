"""What energy modes save, simulated and live. The joules here are written by hand, not measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.research.commands import run
from benchmarks.research.oracle import ORACLES, Spent, by_class, idle_j, oracle, saving, spent, totals
from tests.engine.planning.simulation import costs_of
from tests.engine.planning.test_energy_mode import PROFILE
from tetrion.engine.planning.degrees import DegreeTables
from tetrion.entrypoints.bench.outcomes import Outcome
from tetrion.entrypoints.bench.workloads import TraceRequest

HAND_MADE = {
    "heads": 24,
    "classes": {
        "256x256": {
            "step_ms": {"1": 30, "2": 21, "4": 16},
            "step_j": {"1": 18, "2": 25, "4": 38},
            "encode_ms": 25,
            "decode_ms": 15,
        },
        "1024x1024": {
            "step_ms": {"1": 165, "2": 105, "4": 60},
            "step_j": {"1": 99, "2": 126, "4": 144},
            "encode_ms": 25,
            "decode_ms": 120,
        },
    },
    "meta": {"step_j_source": "written by hand for a test"},
}
SIZES = ("--size", "256x256", "--base-slo", 2.0, "--size", "1024x1024", "--base-slo", 5.5)


def research(*arguments: object) -> int:
    return run([str(argument) for argument in arguments])


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "hand-made.json"
    path.write_text(json.dumps(HAND_MADE))
    return path


def request(slo_s: float | None, size: int = 1024) -> TraceRequest:
    return TraceRequest(arrival_s=0.0, width=size, height=size, num_steps=28, slo_s=slo_s)


def joules_at(name: str, slo_s: float | None) -> float:
    (one,) = oracle(name, (request(slo_s),), DegreeTables(costs_of(PROFILE), 8))
    return one.joules - 25.0  # encode and decode


def test_oracles_take_the_least_joules_that_are_in_time() -> None:
    step_j = {d: 28 * 600 * d * ms / 1e3 for d, ms in PROFILE.classes["1024x1024"].step_ms.items()}
    for name in ORACLES:
        assert joules_at(name, None) == pytest.approx(step_j[1])
        assert joules_at(name, 28 * 0.1647 + 0.156) == pytest.approx(step_j[1])
        assert joules_at(name, 0.5) == pytest.approx(step_j[8]), "what cannot be met is drawn as fast as can be"
    assert joules_at("cheapest-degree", 4.0) == pytest.approx(step_j[2])
    assert step_j[1] < joules_at("cheapest-mixture", 4.0) < step_j[2]


def test_figures_of_a_point() -> None:
    drawn = [
        Spent(size=(256, 256), joules=100.0, gpu_s=1.0, is_met=True, latency_s=1.0),
        Spent(size=(512, 512), joules=300.0, gpu_s=3.0, is_met=False, latency_s=3.0),
        Spent(size=(256, 256), joules=200.0, gpu_s=2.0, is_met=None, latency_s=2.0),
    ]
    idle = idle_j(drawn, device_s=10.0, idle_watts=75.0)
    assert idle == 300.0
    found = by_class(drawn, idle)
    assert list(found) == ["all", "256x256", "512x512"]
    assert (found["all"].joules_per_image, found["all"].with_idle_j, found["all"].attainment) == (200.0, 300.0, 0.5)
    assert (found["256x256"].requests, found["256x256"].with_idle_j, found["256x256"].attainment) == (2, 250.0, 1.0)
    assert by_class(drawn, None)["all"].with_idle_j is None
    assert by_class(drawn, None)["all"].metered_j_per_image is None
    near, far, mode = totals(drawn, idle), totals(drawn[:1], idle), totals(drawn[:2], None)
    assert (near.joules, near.with_idle_j, mode.with_idle_j) == (600.0, 900.0, None)
    between = saving(mode, near, {"best": far, "same": near})
    assert (between.saved_j, between.possible_j) == (200.0, {"best": 500.0, "same": 0.0})
    assert between.realised == {"best": 0.4, "same": None} and between.lower_by_points == 0.0


def test_a_run_counts_the_degrees_that_it_used() -> None:
    outcome = Outcome(request=request(9.0), finished_s=4.0, gpu_s=5.0, degrees=(1, 1, 4))
    failed = Outcome(request=request(9.0), finished_s=None, gpu_s=1.0, degrees=(8,))
    (one,) = spent([outcome, failed], DegreeTables(costs_of(PROFILE), 4), {0: 1234.0})
    assert by_class([one], None)["all"].metered_j_per_image == 1234.0
    assert one.joules == pytest.approx(600 * (2 * 0.1647 + 4 * 0.0598) + 25.0) and one.is_met


def test_the_command_shows_both_ends(profile: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "saving.json"
    given = ("--profile", profile, "--devices", 4, "--rate", 6, "--num-requests", 30, "--seed", 1, *SIZES)
    given += ("--idle-watts", 70, "--mode", "least-energy", "--mode", "balanced", "--output", output)
    assert research("energy-saving", *given) == 0
    record = json.loads(output.read_text())
    systems = ["fastest", "balanced", "least-energy", *ORACLES]
    rows = {(row["system"], row["px"]): row for row in record["rows"]}
    assert list(rows) == [(name, px) for name in systems for px in ("all", "256x256", "1024x1024")]
    joules = [rows[name, "all"]["joules_per_image"] for name in systems]
    assert joules[0] > joules[1] >= joules[2] and all(row["mode"] == "sim" for row in rows.values())
    least = record["savings"][1]
    assert least["system"] == "least-energy" and least["realised"]["cheapest-degree"] >= 0.8
    assert least["totals"]["fastest"]["with_idle_j"] > least["totals"]["fastest"]["joules"]
    shown = capsys.readouterr().out
    assert "of cheapest-degree" in shown and "joules but for metered ones: written by hand for a test" in shown


@pytest.mark.usefixtures("fork_server")
def test_modes_run_live_on_the_same_arrivals(tmp_path: Path) -> None:
    """On CPU workers, whose receipts know no joules. Alone a request runs at both devices, unless joules count."""
    cost = {"step_ms": {"1": 60, "2": 35}, "step_j": {"1": 6, "2": 7}, "encode_ms": 5, "decode_ms": 20}
    (tmp_path / "table.json").write_text(json.dumps({"heads": 12, "classes": {"128x128": cost}}))
    given = ("--profile", tmp_path / "table.json", "--live", "--devices", "cpu:2", "--num-threads", 1, "--rate", 60)
    given += ("--num-requests", 4, "--num-steps", 4, "--seed", 1, "--size", "128x128", "--base-slo", 30)
    assert research("energy-saving", *given, "--output", tmp_path / "saving.json") == 0
    record = json.loads((tmp_path / "saving.json").read_text())
    rows = {row["system"]: row for row in record["rows"] if row["px"] == "all"}
    assert [rows[name]["mode"] for name in ("fastest", "least-energy", *ORACLES)] == ["live", "live", "sim", "sim"]
    assert rows["least-energy"]["joules_per_image"] == pytest.approx(4 * 6)
    assert 4 * 6 <= rows["fastest"]["joules_per_image"] <= 4 * 7  # a slow machine's requests meet, and share devices
    assert rows["fastest"]["metered_j_per_image"] is None and record["savings"][0]["metered_saved_j"] is None
    assert record["savings"][0]["realised"]["cheapest-degree"] == pytest.approx(1.0)
    assert record["ledger"]["counter_j"] is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--devices", 2000), "devices: must be from 1 to 1024"),
        (("--devices", "cpu:2"), "devices: a simulation needs their number"),
        (("--num-threads", 1), "num_threads: is for --live"),
        *((("--extra-j", value), "'--extra-j': ") for value in (-1, 11, "nan")),
        *((("--j-per-s", value), "'--j-per-s': ") for value in (-1, 0, "nan", "inf")),
        (("--j-per-s", -1), "-1.0 is not in the range 0<x<=1000000000"),
        *((("--idle-watts", value), "is not in the range 0<=x<=100000") for value in (-1, "nan", "inf")),
        (("--slo-scale", 0), "slo_scale: must be above 0"),
        (("--profile", "nowhere.json"), "profile: cannot read 'nowhere.json'"),
        (("--trace", "nowhere.jsonl"), "trace: cannot read 'nowhere.jsonl'"),
    ],
)
def test_bad_input(profile: Path, capsys: Any, arguments: tuple[object, ...], says: str) -> None:
    assert research("energy-saving", "--profile", profile, *SIZES, *arguments) == 2
    assert says in capsys.readouterr().err


def test_a_profile_without_joules_is_refused(profile: Path, capsys: Any) -> None:
    bare = json.loads(profile.read_text())
    del bare["classes"]["256x256"]["step_j"], bare["classes"]["1024x1024"]["step_j"]["4"]
    del bare["classes"]["1024x1024"]["step_j"]["2"]
    profile.write_text(json.dumps(bare))
    assert research("energy-saving", "--profile", profile, "--devices", 4, *SIZES) == 2
    assert "no joules (step_j) for 256x256 at degree 2, 4" in capsys.readouterr().err
