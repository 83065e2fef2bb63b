"""Several models on one pool of devices, beside a pool for each, in virtual time."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.research.commands import run
from benchmarks.research.pools import apart
from tetrion.engine.planning.cost.profile import Profile, parse_profile
from tetrion.engine.planning.cost.tables import CostTables
from tetrion.entrypoints.bench.simulation import SimulatedSystem, simulate
from tetrion.entrypoints.bench.workloads import TraceRequest

COST = {"step_ms": {"1": 100.0, "2": 55.0, "4": 30.0}, "encode_ms": 10, "decode_ms": 30}
PLAIN = json.dumps({"heads": 24, "classes": {"512x512": COST}})
GUIDED = json.dumps({"heads": 38, "classes": {"512x512*2": COST}})
WORKLOAD = (
    "--size",
    "512x512",
    "--base-slo",
    "3",
    "--load",
    "0.5",
    "--num-requests",
    "60",
    "--seed",
    "1",
    "--seed",
    "2",
)


def table(text: str) -> Profile:
    return parse_profile(text)


def request(arrival_s: float, model: str) -> TraceRequest:
    return TraceRequest(arrival_s=arrival_s, width=512, height=512, num_steps=10, slo_s=3.0, model=model)


@pytest.fixture
def tables(tmp_path: Path) -> list[str]:
    (tmp_path / "a.json").write_text(PLAIN)
    (tmp_path / "b.json").write_text(GUIDED)
    return ["--profile", f"a={tmp_path / 'a.json'}", "--profile", f"b={tmp_path / 'b.json'}"]


def test_a_models_own_pool_runs_its_requests_and_no_others() -> None:
    profiles = {"a": table(PLAIN), "b": table(PLAIN)}
    shared = SimulatedSystem(tables=CostTables(profiles=profiles), num_devices=4)
    trace = tuple(request(0.4 * i, "aab"[i % 3]) for i in range(12))
    parted = apart(shared).run(trace, "horizon", 1)
    assert tuple(outcome.request for outcome in parted.outcomes) == trace and parted.num_devices == 4
    for model in ("a", "b"):
        own = [one for one in trace if one.model == model]
        alone = simulate(own, profile=profiles, policy="horizon", num_devices=2)
        assert tuple(o for o in parted.outcomes if o.request.model == model) == alone.outcomes
        assert max(max(outcome.degrees) for outcome in alone.outcomes) == 2


def test_the_command_compares_the_same_requests(tables: list[str], tmp_path: Path) -> None:
    output = tmp_path / "R.json"
    assert run(["pools", *tables, "--devices", "4", "--slo-scale", "1", "--output", str(output), *WORKLOAD]) == 0
    record: dict[str, Any] = json.loads(output.read_text())
    (one, each), (compared,) = record["rows"], record["differences"]
    assert [one["system"], each["system"]] == ["1 × 4", "2 × 2"] and one["requests"] == each["requests"] == 120
    assert compared["attainment"] == pytest.approx(one["attainment"] - each["attainment"])
    assert compared["attainment"] == pytest.approx(sum(compared["by_seed"]) / 2)
    assert compared["ci95"][0] <= compared["attainment"] <= compared["ci95"][1]
    assert compared["mean_s"] == pytest.approx(one["mean_s"] / each["mean_s"] - 1)
    assert set(compared["by_model"]) == {"a", "b"} == set(compared["load"])
    assert sum(compared["load"].values()) == pytest.approx(0.5, rel=0.01)
    assert [model["num_branches"] for model in record["workload"]["models"]] == [1, 2]


def test_bad_input_is_one_line(tables: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, complaint in (
        ([], "profile: each model needs its cost table"),
        ([*tables, "--devices", "3"], "devices: 3 do not divide among 2 models"),
        (tables[:2], "devices: 8 do not divide among 1 models, or there is one"),
    ):
        assert run(["pools", *arguments, *WORKLOAD]) != 0
        assert complaint in capsys.readouterr().err
