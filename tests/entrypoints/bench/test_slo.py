"""`tetrion bench slo`: rows, statistics, table, errors, in simulation."""

import json
from pathlib import Path

import msgspec
import pytest

from tests.entrypoints.bench.conftest import small_disk
from tetrion.engine.planning.cost.profile import read_profile
from tetrion.engine.planning.cost.tables import only_table
from tetrion.entrypoints.bench.outcomes import Outcome
from tetrion.entrypoints.bench.simulation import SimulatedSystem
from tetrion.entrypoints.bench.slo import command, parse_loss
from tetrion.entrypoints.bench.slo_points import Grid
from tetrion.entrypoints.bench.slo_run import SloOptions, run
from tetrion.entrypoints.bench.slo_statistics import (
    attainment,
    attainment_by_class,
    attainment_interval,
    by_tenant,
    wilson_interval,
    worst_lateness_s,
)
from tetrion.entrypoints.bench.workloads import (
    TraceRequest,
    Workload,
    base_slo_s,
    make_trace,
    write_trace,
)
from tetrion.entrypoints.errors import InputError

FIELDS = {
    "policy",
    "mode",
    "devices",
    "mix",
    "rate_per_min",
    "slo_scale",
    "requests",
    "attainment",
    "ci95",
    "attainment_by_class",
    "by_tenant",
    "refused",
    "mean_s",
    "p50_s",
    "p95_s",
    "p99_s",
    "gpu_s_per_image",
    "joules_per_image",
    "bound",
}


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    cost = {"step_ms": {"1": 164.7, "2": 105.7, "4": 59.8}, "encode_ms": 25, "decode_ms": 120}
    path = tmp_path / "P.json"
    path.write_text(json.dumps({"heads": 24, "classes": {"1024x1024": cost}}))
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    workload = Workload(rate_per_min=20, num_requests=30, base_slo_s=base_slo_s(8))
    write_trace(tmp_path / "T.jsonl", make_trace(workload, 1))
    return tmp_path / "T.jsonl"


def test_one_line_does_one_point(
    profile: Path, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "R.json"
    record = command(
        simulate=True, profile={"": profile}, trace=[trace], devices=8, policy=["horizon"], output=output, as_json=True
    )
    assert json.loads(output.read_text()) == json.loads(capsys.readouterr().out) == json.loads(json.dumps(record))
    (row,), (beside,) = record["rows"], record["diagnostics"]
    assert set(row) == FIELDS
    assert (row["policy"], row["mode"], row["devices"], row["mix"], row["requests"]) == ("horizon", "sim", 8, "T", 30)
    assert row["joules_per_image"] is None and row["bound"] is None
    assert row["ci95"][0] <= row["attainment"] <= row["ci95"][1]
    assert 0 < row["p50_s"] <= row["p95_s"] <= row["p99_s"] and row["gpu_s_per_image"] > 0
    assert 0 < beside["utilisation"] <= 1 and beside["num_failed"] == 0
    assert 0 < beside["decision_ms"]["p50"] <= beside["decision_ms"]["p99"] <= beside["decision_ms"]["max"]


def grid(profile: Path) -> dict[str, object]:
    return command(
        simulate=True,
        profile={"": profile},
        devices=4,
        policy=["horizon", "fixed-1"],
        mix=["uniform", "skewed"],
        rate=[6.0, 60.0],
        slo_scale=[1.0, 3.0],
        seed=[1, 2],
        num_requests=12,
        simulation={"noise": 0.05},
    )


def test_a_grid_has_a_row_for_each_policy_mix_rate_and_scale_and_repeats(
    profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = grid(profile)["rows"]
    assert isinstance(rows, list)
    keys = [(row["policy"], row["mix"], row["rate_per_min"], row["slo_scale"]) for row in rows]
    assert len(set(keys)) == len(keys) == 16
    assert all(row["requests"] == 24 for row in rows)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 17 and lines[0].startswith("policy") and lines[1].startswith("horizon")
    attained = {key: row["attainment"] for key, row in zip(keys, rows, strict=True)}
    assert attained["horizon", "uniform", 6.0, 3.0] > attained["horizon", "uniform", 60.0, 1.0]
    assert grid(profile)["rows"] == rows


def test_loads_stand_for_rates_and_fitted_slos_are_recorded(profile: Path) -> None:
    machine = {"simulate": True, "profile": {"": profile}, "devices": 2, "num_requests": 8, "seed": [1]}
    workload = {"size": ["1024x1024"], "base_slo": [5.0], "calibrate_slo": True, "load": [0.1, 0.5]}
    record = command(**machine, **workload)  # type: ignore[arg-type]
    device_s = 0.025 + 28 * 0.1647 + 0.120
    expected = [float(f"{load * 60 * 2 / device_s:.3g}") for load in (0.1, 0.5)]
    assert [row["rate_per_min"] for row in record["rows"]] == expected
    assert record["workload"]["loads"] == (0.1, 0.5)
    assert record["workload"]["base_slo_s"] == {"1024x1024": pytest.approx(1.1 * (0.025 + 28 * 0.1057 + 0.120))}
    with pytest.raises(InputError, match="load: must be above 0 and finite, got 0"):
        command(**machine, load=[0.0])  # type: ignore[arg-type]


def test_results_are_handed_on_after_every_row(profile: Path) -> None:
    options = SloOptions(grid=Grid(rates_per_min=(6.0, 60.0), seeds=(1,), num_requests=4), policies=("rssp", "fixed-1"))
    seen: list[int] = []
    system = SimulatedSystem(tables=only_table(read_profile(profile)), num_devices=2)
    results = run(options, system, save=lambda results: seen.append(len(results.rows)))
    assert seen == [1, 2, 3, 4] and len(results.rows) == 4


def test_slo_scale_stretches_the_deadlines_of_a_trace_file(profile: Path, trace: Path) -> None:
    record = command(simulate=True, profile={"": profile}, trace=[trace], devices=1, slo_scale=[0.01, 1000.0])
    assert [row["attainment"] for row in record["rows"]] == [0.0, 1.0]


def test_policies_are_compared_request_by_request_with_the_first(profile: Path) -> None:
    record = command(
        simulate=True, profile={"": profile}, devices=4, policy=["horizon", "fixed-1"], rate=[30.0], num_requests=60
    )
    (ours, theirs), (first, second) = record["rows"], record["diagnostics"]
    assert first["difference"] is None and second["difference"]["to"] == "horizon"
    low, high = second["difference"]["ci95"]
    assert second["difference"]["attainment"] == pytest.approx(theirs["attainment"] - ours["attainment"])
    assert low <= second["difference"]["attainment"] <= high < 0


def test_the_bound_stands_beside_every_policy(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {
        "simulate": True,
        "profile": {"": profile},
        "devices": 4,
        "rate": [30.0],
        "num_requests": 40,
        "seed": [1, 2],
    }
    record = command(**options, policy=["horizon", "fixed-1"], bound=True)  # type: ignore[arg-type]
    bounds = {row["bound"] for row in record["rows"]}
    assert len(bounds) == 1 and all(row["attainment"] <= row["bound"] for row in record["rows"])
    shares = [beside["share_of_the_possible"] for beside in record["diagnostics"]]
    assert shares == [pytest.approx(row["attainment"] / row["bound"]) for row in record["rows"]]
    head, *lines = capsys.readouterr().out.splitlines()
    assert "possible" in head and all(f"{share:.0%}" in line for share, line in zip(shares, lines, strict=True))


def test_first_takes_a_prefix_and_compression_is_recorded(profile: Path) -> None:
    options = {"simulate": True, "profile": {"": profile}, "seed": [1], "num_requests": 40}
    whole, cut = command(**options), command(**options, first=10, compress=4)  # type: ignore[arg-type]
    assert (whole["rows"][0]["requests"], cut["rows"][0]["requests"]) == (40, 10)
    assert cut["workload"]["compress"] == 4 and "÷ 4" in cut["workload"]["compressed"]
    assert whole["workload"]["compressed"] is None
    assert cut["rows"][0]["gpu_s_per_image"] < 0.5 * whole["rows"][0]["gpu_s_per_image"]


def test_joules_are_predicted_where_the_profile_has_them(tmp_path: Path, trace: Path) -> None:
    cost = {"step_ms": {"1": 10.0}, "step_j": {"1": 3.0}, "encode_ms": 5, "decode_ms": 5}
    sizes = ("256x256", "512x512", "1024x1024", "2048x2048")
    path = tmp_path / "J.json"
    path.write_text(json.dumps({"heads": 24, "classes": dict.fromkeys(sizes, cost)}))
    (row,), (beside,) = (command(simulate=True, profile={"": path}, trace=[trace])[k] for k in ("rows", "diagnostics"))
    assert row["joules_per_image"] == pytest.approx(28 * 3.0) and "predicted" in beside["notes"]["joules_per_image"]
    path.write_text(json.dumps({"heads": 24, "classes": dict.fromkeys(sizes[:3], cost)}))
    (row,), (beside,) = (command(simulate=True, profile={"": path}, trace=[trace])[k] for k in ("rows", "diagnostics"))
    assert row["joules_per_image"] is None and "no step_j" in beside["notes"]["joules_per_image"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"simulate": False}, "mode: give one of --simulate, --live and --url"),
        ({"live": True}, "mode: give one of --simulate, --live and --url"),
        ({"profile": {}}, "profile: a simulation needs a cost table"),
        ({"devices": 0}, "devices: must be from 1 to 1024, got 0"),
        ({"devices": 1025}, "devices: must be from 1 to 1024, got 1025"),
        ({"policy": ["horizn"]}, "policy: expected one of horizon, .*'horizn'"),
        ({"mix": ["even"]}, "mix: must be one of uniform, skewed, got 'even'"),
        ({"rate": [0.0]}, "rate_per_min: must be from 0.001 to 1000000, got 0"),
        ({"rate": [float("inf")]}, "rate_per_min: must be from 0.001 to 1000000, got inf"),
        ({"simulation": {"noise": -1.0}}, "noise: must be at least 0"),
        ({"simulation": {"noise": 0.1}, "bound": True}, "bound: with noise"),
        ({"simulation": {"lose": ["soon"]}}, "lose: expected SECONDS:DEVICE .*'soon'"),
        ({"simulation": {"lose": ["1:9"]}}, "lose: device must be from 0 to 7, got 9"),
        ({"slo_scale": [0.0]}, "slo_scale: must be above 0"),
        ({"size": ["256"]}, "size: expected WIDTHxHEIGHT"),
        ({"size": ["256x256"]}, "base_slo: sizes other than the published ones need a base SLO each"),
        ({"size": ["256x256"], "base_slo": [1.0, 2.0]}, "base_slo_s: must be one value for each of 1 sizes"),
        ({"compress": 5}, "compress: 28 steps cannot be divided by 5"),
    ],
)
def test_bad_input_is_one_line(profile: Path, options: dict[str, object], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        command(**({"simulate": True, "profile": {"": profile}, "num_requests": 4} | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["output", "record"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(
    profile: Path, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(tmp_path.iterdir())
    for path in (tmp_path, profile / "R.json"):
        with pytest.raises(InputError, match=f"{option}: "):
            command(simulate=True, profile={"": profile}, num_requests=4, **{option: path})  # type: ignore[arg-type]
    assert set(tmp_path.iterdir()) == before and capsys.readouterr() == ("", "")


def test_on_a_full_disk_the_table_is_printed_and_no_part_of_a_file_is_left(
    profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(tmp_path.iterdir())
    with small_disk(), pytest.raises(OSError, match="File too large"):
        command(
            simulate=True,
            profile={"": profile},
            size=["1024x1024"],
            base_slo=[5],
            num_requests=4,
            output=tmp_path / "R",
        )
    assert set(tmp_path.iterdir()) == before and capsys.readouterr().out.startswith("policy")


def test_a_bad_file_is_named(profile: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"arrival_s": 0, "width": 256, "height": 256, "num_steps": 0}\n')
    with pytest.raises(InputError, match=r"bad\.jsonl: line 1: num_steps: Expected"):
        command(simulate=True, profile={"": profile}, trace=[tmp_path / "bad.jsonl"])
    profile.write_text('{"heads": 24, "classes": {}}')
    with pytest.raises(InputError, match=r"P\.json: profile: classes"):
        command(simulate=True, profile={"": profile})


def test_losses_are_parsed() -> None:
    loss = parse_loss("12.5:3")
    assert (loss.time_s, loss.device_id) == (12.5, 3)
    with pytest.raises(ValueError, match="at least 0 and finite"):
        parse_loss("inf:1")


def outcome(latency_s: float | None, slo_s: float | None = 1.0, px: int = 256, weight: float = 1.0) -> Outcome:
    request = TraceRequest(arrival_s=5.0, width=px, height=px, num_steps=1, slo_s=slo_s, weight=weight)
    return Outcome(request=request, finished_s=None if latency_s is None else 5.0 + latency_s, gpu_s=1.0, degrees=(1,))


def test_attainment_counts_failures_as_missed_and_skips_requests_without_slo() -> None:
    outcomes = [outcome(0.5), outcome(2.0, weight=3.0), outcome(None), outcome(9.0, None)]
    assert attainment(outcomes) == pytest.approx(1 / 3)
    assert attainment(outcomes, weighted=True) == pytest.approx(1 / 5)
    assert attainment([outcome(1.0, None)]) is None
    assert attainment_by_class([outcome(0.5, px=512), outcome(2.0)]) == {"256x256": 0.0, "512x512": 1.0}
    assert worst_lateness_s([outcome(0.5), outcome(3.5)]) == pytest.approx(2.5)
    assert worst_lateness_s([outcome(0.5)]) == 0.0
    assert worst_lateness_s(outcomes) is None


def test_tenants_get_what_their_own_requests_got() -> None:
    def of(tenant: str, latency_s: float | None, *, refused: bool = False) -> Outcome:
        plain = outcome(latency_s)
        request = msgspec.structs.replace(plain.request, tenant=tenant)
        return msgspec.structs.replace(plain, request=request, refused=refused)

    found = by_tenant([of("B", 0.5), of("A", 3.0), of("B", 1.5), of("A", None, refused=True)])
    assert list(found) == ["A", "B"]
    assert (found["A"]["requests"], found["A"]["refused"], found["A"]["attainment"]) == (2, 1, 0.0)
    assert (found["A"]["mean_s"], found["B"]["mean_s"]) == pytest.approx((3.0, 1.0))
    assert (found["B"]["attainment"], found["B"]["device_s"]) == (0.5, 2.0)
    assert by_tenant([outcome(0.5)]) == {} == by_tenant([])
    assert worst_lateness_s([of("A", None, refused=True), of("A", 2.0)]) == pytest.approx(1.0)


def test_the_table_has_a_line_for_each_tenant_and_refusals_where_there_are_any(
    profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = [
        TraceRequest(arrival_s=i / 10, width=1024, height=1024, num_steps=4, slo_s=slo_s, tenant=tenant)
        for i, (tenant, slo_s) in enumerate([("A", 0.01), ("A", 9.0), ("B", 9.0)])
    ]
    write_trace(tmp_path / "tenants.jsonl", requests)
    asked = {"simulate": True, "profile": {"": profile}, "trace": [tmp_path / "tenants.jsonl"], "devices": 2}
    command(**asked, planner=["admission=reject-hopeless"])  # type: ignore[arg-type]
    heading, row, first, second = capsys.readouterr().out.splitlines()
    assert "refused" in heading and "33.3%" in row
    assert first.split()[:4] == ["tenant", "A", "0.500", "50.0%"] and second.split()[:4] == [
        "tenant",
        "B",
        "1.000",
        "0.0%",
    ]
    command(**asked)  # type: ignore[arg-type]
    assert "refused" not in capsys.readouterr().out


def test_wilson_interval_matches_published_values() -> None:
    """Newcombe (1998), table I: 81 of 263 and 0 of 20."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_the_interval_is_wider_where_misses_come_in_bursts() -> None:
    def width(met: list[bool]) -> float:
        interval = attainment_interval([[outcome(0.5 if is_met else 2.0) for is_met in met]])
        assert interval is not None
        return interval[1] - interval[0]

    scattered, bursts = [i % 2 == 0 for i in range(400)], [i // 40 % 2 == 0 for i in range(400)]
    assert width(bursts) > 1.5 * width(scattered) > 0.05
    assert 0 < width([True] * 30) < 0.2
    assert attainment_interval([[outcome(0.5, None)]]) is None


def test_requests_divide_between_the_models_that_have_tables(profile: Path, tmp_path: Path) -> None:
    cost = {"step_ms": {"1": 300.0, "2": 150.0}, "encode_ms": 50, "decode_ms": 120}
    guided = tmp_path / "G.json"
    guided.write_text(json.dumps({"heads": 38, "classes": {"1024x1024*2": cost}}))
    workload = {"size": ["1024x1024"], "base_slo": [4.0], "load": [0.5], "seed": [1], "num_requests": 60}
    record = command(
        simulate=True,
        profile={"a": profile, "b": guided},
        share={"a": 2.0},
        devices=2,
        bound=True,
        **workload,  # type: ignore[arg-type]
    )
    (row,) = record["rows"]
    a_s, b_s = 0.025 + 28 * 0.1647 + 0.120, 0.050 + 28 * 0.3 + 0.120
    assert row["rate_per_min"] == pytest.approx(0.5 * 60 * 2 / (2 / 3 * a_s + 1 / 3 * b_s), rel=0.005)
    assert list(row["attainment_by_class"]) == ["a 1024x1024", "b 1024x1024"]
    assert row["attainment"] <= row["bound"] and row["requests"] == 60
    assert record["workload"]["base_slo_s"] == {"a 1024x1024": 4.0, "b 1024x1024": 4.0}
    assert [(m["name"], m["share"], m["num_branches"]) for m in record["workload"]["models"]] == [
        ("a", 2.0, 1),
        ("b", 1.0, 2),
    ]
    assert list(record["profile"]) == ["a", "b"]
    fitted = command(
        simulate=True,
        profile={"a": profile, "b": guided},
        devices=2,
        calibrate_slo=True,
        **workload,  # type: ignore[arg-type]
    )
    assert fitted["workload"]["base_slo_s"] == {
        "a 1024x1024": pytest.approx(1.1 * (0.145 + 28 * 0.1057)),
        "b 1024x1024": pytest.approx(1.1 * (0.170 + 28 * 0.150)),
    }


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"share": {"c": 1.0}}, "share: 'c' is none of the models: 'a'"),
        ({"floors": {"c": Path("F.json")}}, "floors: 'c' is none of the profiles' models"),
        ({"record": Path("R.jsonl")}, "record: not with named models"),
        ({"simulate": False, "live": True}, "profile: models are named only with --simulate"),
    ],
)
def test_named_models_are_checked(profile: Path, options: dict[str, object], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        command(**({"simulate": True, "profile": {"a": profile}, "num_requests": 4} | options))  # type: ignore[arg-type]
