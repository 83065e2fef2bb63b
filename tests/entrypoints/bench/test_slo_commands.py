"""The command lines around deadlines, as people type them."""

import json
from pathlib import Path

import pytest

from benchmarks.research.commands import run as research
from tetrion.entrypoints.bench.slo_commands import spell
from tetrion.entrypoints.cli import run

HAND_WRITTEN = """{"heads": 24, "classes": {"1024x1024": {"step_ms": {"1": 164.7, "2": 105.7, "4": 59.8},
 "encode_ms": 25, "decode_ms": 120, "step_j": {"1": 100, "2": 120, "4": 150}}}}"""


def test_one_line_does_one_point_with_a_profile_written_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("P.json").write_text(HAND_WRITTEN)
    line = '{"arrival_s": %d, "width": 1024, "height": 1024, "num_steps": 28, "slo_s": 3.0, "weight": 1.0}\n'
    Path("T.jsonl").write_text("".join(line % number for number in range(8)))
    words = "bench slo --simulate --profile P.json --trace T.jsonl --devices 8 --policy horizon --output R.json"
    assert run(words.split()) == 0
    record = json.loads(Path("R.json").read_text())
    (row,) = record["rows"]
    assert (row["attainment"], row["requests"], row["devices"]) == (1.0, 8, 8)
    assert row["joules_per_image"] == pytest.approx(28 * 150)
    assert record["command"] == "tetrion " + words
    assert capsys.readouterr().out.startswith("policy")


def test_record_timeline_replay_and_plots(tmp_path: Path, profile_file: Path) -> None:
    common = ["bench", "slo", "--simulate", "--profile", str(profile_file), "--devices", "4", "--seed", "1"]
    common += ["--num-requests", "12", "--slo-scale", "1", "--slo-scale", "1.5"]
    record, plots = str(tmp_path / "r.jsonl"), str(tmp_path / "plots")
    output = str(tmp_path / "R.json")
    assert run([*common, "--record", record, "--plots", plots, "--output", output, "--bound"]) == 0
    assert (tmp_path / "plots" / "attainment-slo-scale.png").exists()
    assert run(["bench", "timeline", record, "--run", "2", "--png", str(tmp_path / "t.png")]) == 0
    assert research(["replay", record]) == 0
    assert run(["bench", "plot", output, "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "attainment-slo-scale.png").exists() and (tmp_path / "t.png").exists()


def test_bound_prints_a_line_for_each_point(profile_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"bound --profile {profile_file} --devices 4 --rate 6 --rate 60 --seed 1 --num-requests 20"
    assert research([*words.split(), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["rate_per_min"] for row in rows] == [6, 60] and rows[0]["bound"] >= rows[1]["bound"] > 0
    assert research(words.split()) == 0
    assert capsys.readouterr().out.count("at most") == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("bench slo --simulate --profile {p} --devices cpu:2", "devices: a simulation needs their number, got 'cpu:2'"),
        ("bench slo --profile {p}", "mode: give one of --simulate, --live and --url"),
        ("bench slo --live --devices cpu:0", "devices: expected cpu:N"),
        ("bench slo --simulate --profile {p} --planner lead_s", "planner: expected KEY=VALUE such as"),
        ("bench slo --simulate --profile {p} --planner lead_s=7", "planner.lead_s: Expected `float` <= 1.0"),
        (
            "bench slo --simulate --profile {p} --planner late_worth=-1",
            "planner.options.late_worth: Expected `float` >= 0.0",
        ),
        (
            "bench slo --simulate --profile {p} --planner options.late_worth=-1",
            "planner.options.late_worth: Expected `float` >= 0.0",
        ),
        ("bench slo --simulate --profile {p} --planner nix=1", "planner: there is no option 'nix'; policy horizon has"),
        (
            "bench slo --simulate --profile {p} --policy edf --planner late_worth=2",
            "planner: there is no option 'late_worth'; policy edf has none",
        ),
        ("bench slo --simulate --profile {p} --planner policy=edf", "planner: policy: name it with --policy"),
        ("bench slo --simulate --profile {p} --planner admission=no", "planner.admission: Invalid enum value 'no'"),
        ("bench slo --url http://127.0.0.1:1 --planner lead_s=0", "planner: a server has its own settings"),
        ("bench slo --live --planner lead_s=7", "planner.lead_s: Expected `float` <= 1.0"),
        ("bench slo --simulate --profile {p} --beside nix=1", "beside: expected KEY=VALUE,… with keys rate, number,"),
        ("bench slo --simulate --profile {p} --beside rate=1", "beside: size is missing in 'rate=1'"),
        ("bench slo --simulate --profile {p} --beside size=8x8,rate=x", "beside.rate: got 'x'"),
        ("bench slo --simulate --profile {p} --step-share 4", "step_share: expected STEPS=SHARE such as 50=0.3"),
        ("bench slo --simulate --profile {p} --step-share 4=0", "step_shares: must be of shares above 0"),
        ("bench slo --simulate --profile {p} --trace T --tenant A", "tenant: not with a trace"),
        ("bound --profile missing.json", "missing.json"),
        ("replay missing.jsonl", "missing.jsonl"),
        ("bench timeline {p} --png x.png", "not a recording"),
    ],
)
def test_what_is_wrong_is_one_line(
    profile_file: Path, capsys: pytest.CaptureFixture[str], words: str, says: str
) -> None:
    command = run if words.startswith("bench") else research
    assert command(words.format(p=profile_file).split()) in (1, 2)
    err = capsys.readouterr().err
    assert says in err and err.startswith("tetrion: error: ") and err.count("\n") == 1


def test_the_command_line_is_spelt_as_it_was_given() -> None:
    given = {
        "simulate": True,
        "rate": (6.0, 12.0),
        "profile": Path("a b.json"),
        "as_json": True,
        "bias": 0.5,
    }
    spelt = "tetrion bench slo --simulate --rate 6.0 --rate 12.0 --profile 'a b.json' --json --bias 0.5"
    assert spell("slo", given) == spelt


def test_planner_settings_admission_and_tenants_reach_the_rows(tmp_path: Path, profile_file: Path) -> None:
    output = tmp_path / "R.json"
    words = f"bench slo --simulate --profile {profile_file} --devices 4 --seed 1 --num-requests 60 --rate 60"
    words += " --policy horizon --policy edf --planner admission=reject-hopeless --planner drop=fraction"
    words += (
        " --max-inflight 32 --tenant A --beside size=256x256,rate=20,slo=1,tenant=B --step-share 4=1 --step-share 28=1"
    )
    assert run([*words.split(), "--arrivals", "production", "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    ours, edf = record["rows"]
    assert ours["refused"] > 0 and list(ours["by_tenant"]) == ["A", "B"]
    assert sum(tenant["requests"] for tenant in ours["by_tenant"].values()) == ours["requests"] > 60
    assert sum(tenant["refused"] for tenant in ours["by_tenant"].values()) == ours["refused"]
    assert all(tenant["device_s"] > 0 for tenant in edf["by_tenant"].values())
    assert record["planner"]["admission"] == "reject-hopeless" and record["planner"]["max_inflight"] == 32
    assert record["planner"]["options"] == {"horizon": {"drop": "fraction"}}
    assert record["workload"]["sessions"]["tail"] == 2.2 and record["workload"]["beside"][0]["tenant"] == "B"
