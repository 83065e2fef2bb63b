"""What NVML tells, and what it does not."""

import sys
from types import SimpleNamespace

import pytest

from tetrion.engine.hardware.nvml import gpu_facts


class NVMLError(Exception):
    pass


def not_supported(*_: object) -> None:
    raise NVMLError


def test_units_and_what_a_gpu_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM="sm",
        NVML_CLOCK_MEM="memory",
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: closed.append(True),
        nvmlSystemGetDriverVersion=lambda: b"575.57",
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda gpu: f"GPU {gpu}",
        nvmlDeviceGetUUID=lambda gpu: f"GPU-{gpu}",
        nvmlDeviceGetClockInfo=lambda gpu, clock: {"sm": 1980, "memory": 2619}[clock],
        nvmlDeviceGetMaxClockInfo=lambda gpu, clock: 1980,
        nvmlDeviceGetPowerUsage=lambda gpu: 123_400,
        nvmlDeviceGetEnforcedPowerLimit=lambda gpu: 700_000,
        nvmlDeviceGetTemperature=not_supported,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    first, second = gpu_facts()
    assert first["driver"] == "575.57" and (first["name"], second["uuid"]) == ("GPU 0", "GPU-1")
    assert (first["sm_mhz"], first["memory_mhz"], first["power_w"], first["power_limit_w"]) == (1980, 2619, 123.4, 700)
    assert first["temperature_c"] is None and closed


def test_without_nvml_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_facts() == []
