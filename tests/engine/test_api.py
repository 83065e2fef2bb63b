"""An engine whose meter or carbon intensity is not to be had: refused before it starts, or stopped again."""

import psutil
import pytest

from tetrion.engine.api import AsyncEngine
from tetrion.engine.config import EngineConfig, MeteringConfig
from tetrion.engine.energy.early_check import MeteringError
from tetrion.engine.sync_engine import Engine

BAD = [
    (MeteringConfig(carbon=-5.0), "carbon: grams per kWh must be at least 0"),
    (MeteringConfig(meter="replay:/nonexistent"), "meter: cannot read '/nonexistent'"),
]


@pytest.mark.parametrize(("metering", "says"), BAD)
def test_a_bad_meter_or_carbon_is_known_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, metering: MeteringConfig, says: str
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("the model was looked for")

    monkeypatch.setattr("tetrion.engine.api.read_served_models", load)
    config = EngineConfig(devices="cpu:1", metering=metering)
    for make in (AsyncEngine, Engine):
        with pytest.raises(ValueError, match=f"^{says}"):
            make(config)


@pytest.mark.usefixtures("fork_server")
async def test_a_meter_that_does_not_know_the_workers_gpus_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    pids: list[int] = []

    def metering(*_: object) -> None:
        pids.extend(engine.worker_pids().values())
        raise ValueError("meter: NVML shows no GPU GPU-a")

    def calibrate(*_: object) -> None:
        raise AssertionError("calibrated for nothing")

    monkeypatch.setattr("tetrion.engine.api.Metering", metering)
    monkeypatch.setattr("tetrion.engine.api.calibrate", calibrate)
    engine = AsyncEngine(EngineConfig(devices="cpu:2", num_threads=1))
    with pytest.raises(MeteringError, match=r"^meter: NVML shows no GPU GPU-a$"):
        await engine.start()
    assert len(pids) == 2 and not any(psutil.pid_exists(pid) for pid in pids)
