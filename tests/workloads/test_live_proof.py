"""A live proof in several calls: what is left, what fits, what is refused, and what is shown of it."""

import json
import sys
from pathlib import Path

import msgspec
import pytest

from benchmarks.proof import folder as proof_folder
from benchmarks.proof import live as live_proof
from benchmarks.proof.folder import Budget, ProofFolder, Setup, refuse_to_mix, run_s
from benchmarks.proof.recorded_system import RecordedSystem
from benchmarks.proof.results import write_results
from tetrion.engine.planning.cost.profile import Profile
from tetrion.engine.planning.cost.tables import only_table
from tetrion.entrypoints.bench.simulation import SimulatedSystem
from tetrion.entrypoints.bench.slo_points import Grid, Point, points
from tetrion.entrypoints.bench.slo_run import Results, SloOptions, run_points
from tetrion.entrypoints.errors import InputError

COST = {"step_ms": {"1": 100.0, "2": 60.0}, "encode_ms": 25, "decode_ms": 100}
PROFILE = msgspec.convert({"heads": 12, "classes": {"256x256": COST, "512x512": COST}}, Profile, strict=False)
GRID = Grid(
    mixes=("uniform", "skewed"),
    loads=(0.6, 0.2),
    seeds=(1,),
    num_requests=10,
    num_steps=8,
    sizes=((256, 256), (512, 512)),
    base_slo_s=(2.0, 3.0),
    compress=4,
)
MACHINE = {"model": "shapes", "devices": ["cpu:0", "cpu:1"], "max_inflight": 64, "commit": "abc"}
POLICIES = ("horizon", "fixed-1")


@pytest.fixture
def folder(tmp_path: Path) -> ProofFolder:
    made = ProofFolder(tmp_path / "proof")
    setup = Setup(
        options={"seed": 1},
        machine=MACHINE,
        host={"cpu": "that of the first call"},
        num_devices=2,
        base_slo_s={"256x256": 2.0, "512x512": 3.0},
        points=tuple(points(GRID, 2, lambda: only_table(PROFILE))),
    )
    made.begin(setup, PROFILE)
    return made


def do(folder: ProofFolder, point: Point, policy: str, call: str = "first") -> None:
    """As a live run, in virtual time."""
    results, options = Results(recordings=[]), SloOptions(grid=GRID, policies=(policy,), keep_chunks=True)
    run_points(options, [point], SimulatedSystem(tables=only_table(PROFILE), num_devices=2), results)
    ledger = {"num_windows": len(folder.recordings(point.mix)) + 1}
    facts = {"call": call, "ledger": ledger}
    folder.add(point.mix, [msgspec.structs.replace(r, facts=facts) for r in results.recordings])


def test_a_later_call_finds_setup_and_does_what_is_left(folder: ProofFolder) -> None:
    left = list(folder.left(["uniform"], POLICIES))
    assert [policy for _, policy in left] == ["horizon", "fixed-1"] * 2
    assert left[0][0] == left[1][0] != left[2][0] and left[0][0].rate_per_min > left[2][0].rate_per_min  # type: ignore[operator]
    for point, policy in left[:3]:
        do(folder, point, policy)
    again = ProofFolder(folder.path)
    assert again.setup == folder.setup and again.profile == PROFILE
    assert list(again.left(["uniform"], POLICIES)) == left[3:]
    assert list(again.left(["uniform"], ["rssp", "horizon"])) == [(left[0][0], "rssp"), (left[2][0], "rssp")]
    assert len(list(again.left(["skewed", "uniform"], POLICIES))) == 5


def test_a_run_of_another_trace_counts_for_nothing(folder: ProofFolder) -> None:
    point = next(folder.left(["uniform"], POLICIES))[0]
    other = msgspec.structs.replace(point, traces=((1, point.traces[0][1][:5]),))
    do(folder, other, "horizon")
    assert next(folder.left(["uniform"], POLICIES)) == (point, "horizon")
    with pytest.raises(LookupError, match="no recording of horizon on this trace"):
        RecordedSystem(folder.recordings("uniform")).run(point.traces[0][1], "horizon", 1)


def test_what_differs_is_named_and_refused(folder: ProofFolder) -> None:
    refuse_to_mix(folder.path, MACHINE, dict(MACHINE))
    with pytest.raises(InputError) as error:
        refuse_to_mix(folder.path, MACHINE, MACHINE | {"commit": "def", "devices": ["cpu:0"], "new": 1})
    assert "commit: 'abc' there, 'def' now" in str(error.value) and "devices: ['cpu:0', 'cpu:1']" in str(error.value)
    assert "new: None there, 1 now" in str(error.value) and "model" not in str(error.value)


def test_recordings_of_unknown_making_are_refused(folder: ProofFolder) -> None:
    do(folder, next(folder.left(["uniform"], POLICIES))[0], "horizon")
    (folder.path / "setup.json").unlink()
    with pytest.raises(InputError, match=r"slo-live-2-uniform\.jsonl has recordings but there is no setup\.json"):
        ProofFolder(folder.path)
    (folder.path / "setup.json").write_text("{}")
    with pytest.raises(InputError, match=r"setup\.json: not the setup of a proof"):
        ProofFolder(folder.path)


def test_a_run_is_allowed_its_arrivals_and_what_is_queued_after_them(folder: ProofFolder) -> None:
    point = next(folder.left(["uniform"], POLICIES))[0]
    trace = point.traces[0][1]
    assert run_s(folder, point, "horizon") > trace[-1].arrival_s + proof_folder.MARGIN_S
    jam = tuple(msgspec.structs.replace(request, arrival_s=0.0) for request in trace)
    jammed = run_s(folder, msgspec.structs.replace(point, traces=((1, jam),)), "fixed-1")
    assert jammed > proof_folder.MARGIN_S + len(trace) / 2 * 2 * 0.1


def test_a_budget_is_counted_from_its_beginning() -> None:
    now_s = 100.0
    budget = Budget(30.0, lambda: now_s)
    now_s = 125.0
    assert budget.left_s == 5.0
    assert Budget(None).left_s == float("inf")


def test_results_are_made_of_what_is_there(folder: ProofFolder) -> None:
    left = list(folder.left(["uniform"], POLICIES))
    for number, (point, policy) in enumerate(left[:3]):
        do(folder, point, policy, call="first" if number < 2 else "second")
    write_results(folder, GRID, "uniform", "the command")
    made = json.loads((folder.path / "slo-live-2-uniform.json").read_text())
    rates = [point.rate_per_min for point, _ in left]
    assert [(row["policy"], row["rate_per_min"]) for row in made["rows"]] == list(
        zip(("horizon", "fixed-1", "horizon"), rates[:3], strict=True)
    )
    assert [beside["difference"] is None for beside in made["diagnostics"]] == [True, False, True]
    assert made["diagnostics"][1]["difference"]["to"] == "horizon" and len(made["agreement"]) == 3
    assert made["calls"] == [
        {"begun": "first", "runs": 2, "ledger": {"num_windows": 2}},
        {"begun": "second", "runs": 1, "ledger": {"num_windows": 3}},
    ]
    assert made["commit"] == "abc" and made["system"] == MACHINE and made["host"]["cpu"] == "that of the first call"
    assert made["workload"]["base_slo_s"] == {"256x256": 2.0, "512x512": 3.0}
    assert (folder.path / "slo-live-2-uniform.png").stat().st_size > 0


def test_a_command_refuses_to_go_on_otherwise_but_shows_what_is_there(
    folder: ProofFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["live_proof", str(folder.path), "--devices", "cpu:2", "--mix", "uniform", "--policy", "horizon"]
    words += ["--size", "256x256", "--size", "512x512", "--base-slo", "2", "--base-slo", "3", "--num-requests", "10"]
    given = {"load_format": None, "profile": None, "load": list(live_proof.LOADS), "slo_scale": [1.0], "seed": 1}
    given |= {"num_requests": 10, "size": ["256x256", "512x512"], "base_slo": [2.0, 3.0]}
    assert folder.setup is not None
    folder.begin(msgspec.structs.replace(folder.setup, options=given), PROFILE)
    do(folder, next(folder.left(["uniform"], POLICIES))[0], "horizon")
    monkeypatch.setenv("TETRION_COMMIT", "def")
    monkeypatch.setattr(sys, "argv", [*words, "--budget-s", "0"])
    live_proof.main()
    assert capsys.readouterr().out.startswith("policy"), "results need no engine and mix nothing"
    for options, says in ((["--seed", "2"], "seed: 1 there, 2 now"), ([], "commit: 'abc' there, 'def' now")):
        monkeypatch.setattr(sys, "argv", [*words, *options])
        with pytest.raises(SystemExit) as stopped:
            live_proof.main()
        assert stopped.value.code == 2 and says in capsys.readouterr().err
    assert len(folder.recordings("uniform")) == 1
