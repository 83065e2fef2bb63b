"""Meters: NVML through a stand-in library, RAPL on files, recordings, and what nothing is known of."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tetrion.engine.energy.metering import open_meter
from tetrion.engine.energy.meters.base import EnergyMeter, MeterUnavailable, ModelMeter, NoMeter, Reading
from tetrion.engine.energy.meters.nvml import NvmlMeter
from tetrion.engine.energy.meters.rapl import RaplMeter
from tetrion.engine.energy.meters.replay import ReplayMeter, read_recording
from tetrion.entrypoints.energy_windows import CounterWindows, ZeusWindows


class FakeNvml:
    """Two GPUs with counters; what is in `broken` raises."""

    class NVMLError(Exception):
        pass

    def __init__(self, broken: tuple[str, ...] = ()) -> None:
        self.broken = broken
        self.counters_mj = [1000.0, 2000.0]
        self.instant_mw = 350_000
        self.num_open = 0

    def _check(self, name: str) -> None:
        if name in self.broken:
            raise self.NVMLError(name)

    def nvmlInit(self) -> None:
        self._check("init")
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self.num_open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> float:
        self._check(f"energy{handle}")
        return self.counters_mj[handle]

    def nvmlDeviceGetFieldValues(self, handle: int, fields: list[int]) -> list[Any]:
        self._check("fields")
        return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=self.instant_mw))]

    def nvmlDeviceGetPowerUsage(self, handle: int) -> float:
        return 300_000.0


def test_nvml_reads_by_uuid_in_joules_and_watts() -> None:
    meter = NvmlMeter(["GPU-1"], nvml=FakeNvml(), now_s=lambda: 7.0)
    assert meter.read() == Reading(time_s=7.0, joules={"GPU-1": 2.0}, watts={"GPU-1": 350.0})
    assert meter.read(counters=False) == Reading(time_s=7.0, joules={}, watts={"GPU-1": 350.0})


def test_nvml_takes_a_uuid_as_cuda_writes_it() -> None:
    assert NvmlMeter(["1"], nvml=FakeNvml()).uuids == ("GPU-1",)


def test_nvml_falls_back_to_mean_power_and_leaves_out_what_fails() -> None:
    nvml = FakeNvml(broken=("fields",))
    meter = NvmlMeter(nvml=nvml)
    assert meter.read().watts == {"GPU-0": 300.0, "GPU-1": 300.0}
    nvml.broken = ("energy0",)
    assert meter.read().joules == {"GPU-1": 2.0}


@pytest.mark.parametrize(
    ("broken", "uuids", "reason"),
    [(("init",), None, "does not start"), (("energy1",), None, "no energy counter"), ((), ["GPU-9"], "shows no GPU")],
)
def test_nvml_says_why_it_cannot_and_closes_what_it_opened(broken: tuple[str, ...], uuids: Any, reason: str) -> None:
    nvml = FakeNvml(broken)
    with pytest.raises(MeterUnavailable, match=reason):
        NvmlMeter(uuids, nvml=nvml)
    assert nvml.num_open == 0


def package(folder: Path, number: int, energy_uj: int, name: str = "package-0") -> Path:
    path = folder / f"intel-rapl:{number}"
    path.mkdir()
    (path / "name").write_text(name + "\n")
    (path / "max_energy_range_uj").write_text("10000000\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    return path / "energy_uj"


def test_rapl_counts_on_when_its_counter_starts_again(tmp_path: Path) -> None:
    counter = package(tmp_path, 0, 9_000_000)
    package(tmp_path, 1, 5, name="psys")
    meter = RaplMeter(tmp_path)
    assert meter.uuids == ("cpu-package-0",)
    counter.write_text("1000000")
    assert meter.read().joules == {"cpu-package-0": pytest.approx(2.0)}
    counter.unlink()
    assert meter.read().joules == {}


def test_rapl_that_may_not_be_read_is_unavailable(tmp_path: Path) -> None:
    package(tmp_path, 0, 1).unlink()
    with pytest.raises(MeterUnavailable, match="no CPU energy counter"):
        RaplMeter(tmp_path)


def test_a_recording_is_given_again_and_then_nothing(tmp_path: Path) -> None:
    path = tmp_path / "readings.jsonl"
    path.write_text('{"time_s": 1, "joules": {"GPU-a": 5}, "watts": {}}\n\n{"time_s": 2, "joules": {}, "watts": {}}\n')
    assert read_recording(path).uuids == ("GPU-a",)
    readings = [Reading(time_s=1.0, joules={"GPU-a": 5.0}, watts={}), Reading(time_s=2.0, joules={}, watts={})]
    meter = ReplayMeter(readings)
    assert [meter.read() for _ in range(3)] == [*readings, readings[-1]]
    path.write_text('{"time_s": "soon"}\n')
    with pytest.raises(MeterUnavailable, match="line 1"):
        read_recording(path)


def test_a_recording_keeps_step_with_a_clock() -> None:
    times = [500.0, 500.9, 501.1, 504.5, 504.6, 505.0, 600.0]
    powers = [Reading(time_s=7.0 + i, joules={}, watts={"a": float(i)}) for i in range(6)]
    powers[3] = Reading(time_s=10.0, joules={"a": 1000.0}, watts={"a": 3.0})
    meter = ReplayMeter(powers, iter(times).__next__)
    told = [(reading.time_s, reading.watts) for reading in (meter.read() for _ in times)]
    assert told == [
        (500.0, {"a": 0.0}),
        (500.0, {}),
        (501.0, {"a": 1.0}),
        (503.0, {"a": 3.0}),  # of three that were due the one that tells joules
        (503.0, {}),
        (505.0, {"a": 5.0}),
        (505.0, {}),
    ]


@pytest.mark.parametrize(
    ("meter", "reason"),
    [
        (NoMeter("there is no GPU"), "there is no GPU"),
        (ModelMeter(()), "the meter 'model' has no counters"),
        (ModelMeter(("a",)), "a did not tell its counter"),
        (
            ReplayMeter([Reading(time_s=t, joules={}, watts={"a": 100.0}) for t in (1.0, 6.0)]),
            "'replay' has no counters",
        ),
    ],
)
def test_a_window_of_a_meter_that_measures_nothing_is_none_with_the_reason(meter: EnergyMeter, reason: str) -> None:
    windows = CounterWindows(meter)
    windows.begin()
    measured = windows.end()
    assert (measured.gpu_j, measured.total_j) == (None, None) and reason in measured.reason


def test_a_window_is_a_difference_of_counters() -> None:
    readings = [Reading(time_s=t, joules={"a": 10.0 + 300 * t}, watts={}) for t in (1.0, 6.0)]
    windows = CounterWindows(ReplayMeter(readings))
    windows.begin()
    measured = windows.end()
    assert (measured.seconds, measured.gpu_j) == (5.0, {"a": 1500.0})
    windows.begin()
    assert windows.end().gpu_j is None  # the recording is over


class FakeMonitor:
    def __init__(self, energy: dict[int, float], **_: Any) -> None:
        self.energy, self.keys = energy, []

    def begin_window(self, key: str, sync_execution: bool) -> None:
        assert not sync_execution
        self.keys.append(key)

    def end_window(self, key: str, sync_execution: bool) -> Any:
        assert key == self.keys[-1]
        return SimpleNamespace(time=5.0, gpu_energy=self.energy)


def test_zeus_windows_have_names_of_their_own_and_no_energy_is_not_zero() -> None:
    monitors = []

    def make(energy: dict[int, float]) -> ZeusWindows:
        def monitor(**options: Any) -> FakeMonitor:
            monitors.append(FakeMonitor(energy, **options))
            return monitors[-1]

        return ZeusWindows([(3, "GPU-x")], monitor)

    measuring = make({3: 1234.0})
    for _ in range(2):
        measuring.begin()
        assert measuring.end().gpu_j == {"GPU-x": 1234.0}
    assert len(set(monitors[0].keys)) == 2
    blind = make({})
    blind.begin()
    assert blind.end().total_j is None


def test_the_real_zeus_on_a_machine_without_a_gpu_says_so() -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU here")
    try:
        windows = ZeusWindows([])
    except MeterUnavailable:
        return
    windows.begin()
    assert windows.end().total_j is None


def test_without_gpus_the_automatic_meter_knows_nothing_and_a_named_one_is_an_error(tmp_path: Path) -> None:
    assert "CPU workers" in open_meter("auto", ()).reason
    assert open_meter("model", ()).source == "model"
    with pytest.raises(ValueError, match="meter: cannot read"):
        open_meter(f"replay:{tmp_path}/none", ())
