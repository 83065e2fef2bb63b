"""`tetrion bench energy`: the plan, windows on a real engine, rows, export; without a GPU by a meter of our own."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlenergy.data.records import DiffusionRuns
from scipy import stats

from tests.entrypoints.conftest import draw
from tetrion.engine.api import AsyncEngine
from tetrion.engine.config import EngineConfig
from tetrion.engine.energy.meters.base import NoMeter, Reading
from tetrion.engine.request import ImageRequest, ImageResult, Receipt
from tetrion.entrypoints.bench import energy
from tetrion.entrypoints.bench.energy import table
from tetrion.entrypoints.bench.energy_export import export
from tetrion.entrypoints.bench.energy_points import (
    MIN_WINDOWS,
    EnergyPoint,
    SweepOptions,
    describe,
    interval,
    is_settled,
    least_duration_s,
    longest_duration_s,
    pictures_per_lane,
    shuffled,
    sweep_points,
)
from tetrion.entrypoints.bench.energy_published import published_beside
from tetrion.entrypoints.bench.energy_run import EnergyBench, MeasuredWindow, PointResult, classes_of, joules
from tetrion.entrypoints.bench.ledger import ledger_facts
from tetrion.entrypoints.bench.workloads import TraceRequest
from tetrion.entrypoints.energy_windows import CounterWindows, WindowEnergy
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.recommend.sources import read_source
from tetrion.entrypoints.record import write_record

OPTIONS = SweepOptions(
    sizes=((128, 128), (256, 256)), num_steps=(2,), degrees=(1, 2), window_s=0.05, cool_s=0.0, target=9.0
)
POINT = EnergyPoint(width=1024, height=512, num_steps=28, degree=2, in_flight=2)
BENCH = ("bench", "energy", "--devices", "cpu:2", "--sizes", "128x128", "--dry-run", "--json")


class ConstantPower(NoMeter):
    """Two GPUs that draw 100 and 200 W."""

    source, reason, resolution_s = "constant", "", 0.0
    uuids = ("GPU-a", "GPU-b")

    def __init__(self) -> None:
        pass

    def read(self, counters: bool = True) -> Reading:
        now_s = time.monotonic()
        return Reading(time_s=now_s, joules={"GPU-a": 100 * now_s, "GPU-b": 200 * now_s}, watts={})


def test_a_sweep_keeps_all_devices_busy_and_its_order_is_random_but_repeatable() -> None:
    points = sweep_points(OPTIONS, 4)
    assert [(p.width, p.degree, p.in_flight) for p in points] == [(128, 1, 4), (128, 2, 2), (256, 1, 4), (256, 2, 2)]
    orders = {tuple(shuffled(points, OPTIONS, number)) for number in range(8)}
    assert len(orders) > 1 and all(set(order) == set(points) for order in orders)
    assert shuffled(points, OPTIONS, 3) == shuffled(points, OPTIONS, 3)


@given(st.floats(0.001, 100), st.floats(5, 60))
def test_a_lane_takes_at_least_a_window_and_hardly_more(latency_s: float, window_s: float) -> None:
    options = SweepOptions(sizes=(), num_steps=(), degrees=(), window_s=window_s)
    num = pictures_per_lane(options, latency_s)
    assert num * latency_s >= window_s * (1 - 1e-9)
    assert (num - 1) * latency_s < window_s


def test_the_plans_duration_is_idle_power_warm_ups_pauses_and_windows() -> None:
    options = SweepOptions(sizes=(), num_steps=(), degrees=(), window_s=5.0, cool_s=2.0)
    assert least_duration_s([POINT], options, lambda _: 4.0) == pytest.approx(7 + 2 * 4 + MIN_WINDOWS * (2 + 8))
    assert least_duration_s([POINT], options, lambda _: None) == pytest.approx(7 + MIN_WINDOWS * 7)


def test_a_run_takes_its_budget_and_what_no_budget_cuts_short() -> None:
    options = SweepOptions(sizes=(), num_steps=(), degrees=(), window_s=5.0, cool_s=2.0, budget_s=100.0)
    last_window_s = 2 + 5 + 4
    assert longest_duration_s([POINT], options, lambda _: 4.0) == pytest.approx(7 + 100 + last_window_s)
    assert longest_duration_s([POINT], options, lambda _: None) == pytest.approx(7 + 100 + 2 + 5 + 5)
    short = msgspec.structs.replace(options, budget_s=1.0)
    assert longest_duration_s([POINT], short, lambda _: 60.0) == pytest.approx(7 + 2 * 60), "warm-ups alone"
    assert "budget_s is over before every point has 3 windows" in describe([POINT], short, lambda _: 60.0)["note"]
    plan = describe([POINT], options, lambda _: 4.0)
    assert plan["at_most_s"] >= plan["least_duration_s"] and plan["note"] == (
        "the engine's start and end are not counted"
    )


class UnsteadyEngine:
    """Its first two pictures are slow, those after them quick, every second one quicker still."""

    def __init__(self) -> None:
        self.num_begun = 0

    async def generate(self, request: ImageRequest) -> ImageResult:
        self.num_begun += 1
        latency_s = 0.3 if self.num_begun <= 2 else 0.03 + 0.01 * (self.num_begun % 2)
        await asyncio.sleep(latency_s)
        return msgspec.structs.replace(draw(request), latency_s=latency_s)


async def test_a_window_is_never_shorter_than_asked_for_and_every_lane_draws_as_many() -> None:
    """Though by the warm-ups one picture would do."""
    options = msgspec.structs.replace(OPTIONS, window_s=0.3)
    bench = EnergyBench(UnsteadyEngine(), CounterWindows(ConstantPower()))  # type: ignore[arg-type]
    (result,) = await bench.sweep([POINT], options)
    assert len(result.windows) == MIN_WINDOWS
    for window in result.windows:
        assert window.energy.seconds >= options.window_s
        assert window.num_images == len(window.latencies_s) and window.num_images % POINT.in_flight == 0
        assert window.num_images >= 2 * POINT.in_flight


@given(st.lists(st.floats(1, 1e4), min_size=2, max_size=30))
def test_the_interval_is_students_or_a_little_wider(values: list[float]) -> None:
    mean, ci95 = interval(values)
    assert ci95 is not None
    exact = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    assert exact * 0.999 - 1e-9 <= ci95[1] - mean <= exact * 1.02 + 1e-9


def test_a_point_is_settled_after_enough_windows_that_agree() -> None:
    assert not is_settled([100.0, 100.0], 0.02)
    assert is_settled([100.0, 100.1, 99.9], 0.02)
    assert not is_settled([100.0, 110.0, 90.0], 0.02)


@pytest.mark.usefixtures("fork_server")
async def test_windows_of_a_real_engine_count_all_devices_and_every_picture() -> None:
    async with AsyncEngine(EngineConfig(devices="cpu:2", num_threads=1)) as engine:
        bench = EnergyBench(engine, CounterWindows(ConstantPower()))
        idle = await bench.idle(OPTIONS)
        results = await bench.sweep(sweep_points(msgspec.structs.replace(OPTIONS, sizes=((128, 128),)), 2), OPTIONS)
        trace = tuple(
            TraceRequest(arrival_s=0.1 * i, width=128, height=128, num_steps=1, slo_s=60.0) for i in range(15)
        )
        steady = await bench.arrivals(trace)
        ledger = ledger_facts(engine.stats())
    assert bench.latest_receipt is not None and "CPU workers" in bench.latest_receipt.reasons["active_j"]
    assert ledger["counter_j"] is None and ledger["unattributed_share"] is None
    assert idle.total_j is not None and idle.total_j / idle.seconds == pytest.approx(300)
    for result in results:
        assert len(result.windows) >= MIN_WINDOWS
        for window in result.windows:
            assert window.num_images == len(window.latencies_s) and window.num_images % result.point.in_flight == 0
            assert window.energy.seconds >= OPTIONS.window_s
            assert window.energy.total_j == pytest.approx(300 * window.energy.seconds)
    assert (steady.from_s, steady.to_s) == pytest.approx((0.1 * 3, 0.1 * 14))
    assert steady.window.energy.seconds > 0.1 * 10
    assert 0 < steady.window.num_images <= len(trace)
    assert list(steady.by_class) == ["all", "128x128"] and steady.by_class["all"] == steady.by_class["128x128"]
    assert (steady.by_class["all"].num_drawn, steady.by_class["all"].active_j) == (15, None)
    assert steady.by_class["all"].attainment is not None and 0 < steady.by_class["all"].attainment <= 1


def window(total_j: float | None, num_images: int = 4) -> MeasuredWindow:
    gpu_j = None if total_j is None else {"GPU-a": 0.75 * total_j, "GPU-b": 0.25 * total_j}
    energy = WindowEnergy(seconds=8.0, gpu_j=gpu_j, reason="" if gpu_j else "no meter")
    gpus = [{"name": "NVIDIA H100", "temperature_c": 50.0}]
    return MeasuredWindow(energy=energy, num_images=num_images, latencies_s=(3.0, 5.0), gpus=gpus)


def test_joules_are_a_mean_over_windows_or_none_with_a_reason() -> None:
    mean, ci95, reason = joules([window(400.0), window(440.0), window(420.0)])
    assert mean == pytest.approx(105.0) and ci95 is not None and ci95[0] < 105 < ci95[1] and not reason
    assert joules([window(400.0), window(None)]) == (None, None, "no meter")
    assert joules([])[0] is None and joules([])[2]


def test_the_export_is_loaded_by_mlenergy_data(tmp_path: Path) -> None:
    results = [
        PointResult(point=POINT, windows=(window(400.0), window(420.0))),
        PointResult(
            point=EnergyPoint(width=64, height=64, num_steps=1, degree=1, in_flight=1), windows=(window(None),)
        ),
    ]
    export(
        tmp_path, results, model="black-forest-labs/FLUX.1-dev", gpu="H100", total_params_b=12.0, precision="bfloat16"
    )
    (run,) = DiffusionRuns.from_raw_results(tmp_path, n_workers=1)
    assert (run.model_id, run.gpu_model, run.task) == ("black-forest-labs/FLUX.1-dev", "H100", "text-to-image")
    assert (run.height, run.width, run.inference_steps) == (512, 1024, 28)
    assert (run.num_gpus, run.ulysses_degree, run.ring_degree, run.batch_size) == (2, 2, 1, 1)
    assert run.energy_per_generation_joules == pytest.approx(102.5)
    assert run.batch_latency_s == pytest.approx(4.0)
    assert run.total_params_billions == 12.0


def test_a_dry_run_says_what_would_be_done_and_how_long(tetrion: Callable[..., int], capsys: Any) -> None:
    arguments = (*BENCH, "--degrees", "1,2")
    assert tetrion(*arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [point["degree"] for point in plan["points"]] == [1, 2]
    assert plan["least_windows"] == 6 and plan["least_duration_s"] >= 6 * 7
    assert plan["at_most_s"] > 7 + 3600 + 7 and "start and end are not counted" in plan["note"]
    assert tetrion(*arguments, "--rate", 60, "--num-requests", 10) == 0
    open_loop = json.loads(capsys.readouterr().out)
    assert open_loop["num_requests"] == 10 and open_loop["least_duration_s"] > 7


@pytest.mark.parametrize(
    ("option", "value", "bound"),
    [
        *(("--window-s", value, "5<=x<=3600") for value in (1, "nan", "inf")),
        *(("--cool-s", value, "0<=x<=3600") for value in (-1, "nan", "inf")),
        *(("--budget-s", value, "0<x<=1000000") for value in (0, -1, "nan", "inf")),
        *(("--target", value, "0.001<=x<=1") for value in (0, "nan")),
        *(("--rate", value, "0.001<=x<=1000000") for value in (0, "nan", "inf")),
        ("--seed", -1, "x>=0"),
        *(("--steps", value, "steps: must be from 1 to 1000, got") for value in (0, 5000, "4,1001")),
        ("--trace", "nowhere.jsonl", "trace: cannot read 'nowhere.jsonl'"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(
    tetrion: Callable[..., int], capsys: Any, option: str, value: object, bound: str
) -> None:
    assert tetrion(*BENCH, option, value) == 2
    told = capsys.readouterr()
    assert option.strip("-") in told.err and bound in told.err and not told.out


@pytest.fixture
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line takes none below 5 s, which is for GPUs' counters."""
    window, idle = EnergyBench._window, EnergyBench.idle

    def short(options: SweepOptions) -> SweepOptions:
        return msgspec.structs.replace(options, window_s=OPTIONS.window_s)

    monkeypatch.setattr(EnergyBench, "_window", lambda bench, point, options: window(bench, point, short(options)))
    monkeypatch.setattr(EnergyBench, "idle", lambda bench, options: idle(bench, short(options)))


@pytest.mark.usefixtures("fork_server", "short_windows")
def test_without_a_meter_the_command_runs_and_joules_are_null(
    tetrion: Callable[..., int], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a sweep that is ended from outside leaves the rounds before."""
    output, folder = tmp_path / "energy.json", tmp_path / "export"
    written: list[tuple[int, bool]] = []

    def write_watched(record: dict[str, Any], path: Path | None) -> str:
        written.append((record["details"][0]["num_windows"], "cut_short" in record))
        return write_record(record, path)

    monkeypatch.setattr(energy, "write_record", write_watched)
    status = tetrion(
        *("bench", "energy", "--devices", "cpu:1", "--num-threads", 1, "--sizes", "128x128", "--steps", 2),
        *("--degrees", 1, "--cool-s", 0, "--output", output, "--export", folder),
    )
    assert status == 0
    assert written == [*((number, True) for number in range(1, MIN_WINDOWS + 1)), (MIN_WINDOWS, False)]
    record = json.loads(output.read_text())
    (row,), (detail,) = record["rows"], record["details"]
    assert list(row) == [
        *("system", "model", "px", "steps", "devices", "degree", "batch"),
        *("joules_per_image", "ci95", "latency_s", "watts", "idle_watts"),
    ]
    assert row["joules_per_image"] is None and row["watts"] is None and row["idle_watts"] is None
    assert row["latency_s"] > 0 and detail["num_windows"] == MIN_WINDOWS and "CPU workers" in detail["reason"]
    assert "no joules" in capsys.readouterr().out
    assert not folder.exists()
    with pytest.raises(InputError, match=r"energy\.json: has no row with joules"):
        read_source(tmp_path)


def test_published_figures_stand_beside_the_same_configuration_only() -> None:
    row = {"model": "flux1-dev", "px": "1024x1024", "steps": 50, "devices": 4, "degree": 2, "joules_per_image": 4349.5}
    beside = published_beside(row, "NVIDIA H100 80GB HBM3")
    assert beside is not None and round(beside["joules_per_image"]) == 8699 and round(beside["latency_s"], 2) == 8.18
    assert beside["share_of_published"] == pytest.approx(0.5, abs=1e-3)
    unmetered = published_beside(row | {"joules_per_image": None}, "NVIDIA H100 80GB HBM3")
    assert unmetered is not None and unmetered["share_of_published"] is None
    for other in ({"steps": 28}, {"px": "512x512"}, {"model": "shapes"}, {"degree": 3}, {"degree": None}):
        assert published_beside(row | other, "NVIDIA H100 80GB HBM3") is None
    assert published_beside(row, "") is None and published_beside(row, "NVIDIA A100") is None
    shown = row | {"ci95": None, "latency_s": 4.0, "watts": 1300.0, "idle_watts": 140.0}
    detail = {"reason": None, "published": beside, "gpus": [[{"name": "H100", "temperature_c": 61.0}]]}
    assert table([shown], [detail]).splitlines()[1].split()[-4:] == ["61", "8699", "0.50", "8.177"]


def test_an_open_loop_is_told_by_class() -> None:
    trace = tuple(
        TraceRequest(arrival_s=i, width=64 * s, height=64, num_steps=1, slo_s=slo)
        for i, (s, slo) in enumerate(((2, 1.0), (1, 1.0), (1, None), (2, 1.0)))
    )
    picture = draw(ImageRequest(prompt="x", width=64, height=64, num_steps=1, seed=1, slo_ms=900))
    metered = msgspec.structs.replace(picture, energy=Receipt(method="nvml", active_j=30.0))
    found = classes_of(trace, {0: metered, 1: metered, 2: picture})
    assert [(size, c.num_requests, c.num_drawn) for size, c in found.items()] == [
        ("all", 4, 3),
        ("64x64", 2, 2),
        ("128x64", 2, 1),
    ]
    assert [c.attainment for c in found.values()] == [pytest.approx(2 / 3), 1.0, 0.5]
    assert [c.active_j for c in found.values()] == [None, None, 30.0]
