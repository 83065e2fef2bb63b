"""What of a metering configuration is refused before there are workers."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tetrion.engine.config import MeteringConfig
from tetrion.engine.energy.early_check import check_metering
from tetrion.engine.energy.meters.base import MeterUnavailable


class NvmlError(Exception):
    pass


def nvml_with_gpus_without_counters(is_open: list[bool]) -> Any:
    def refuse(*_: object) -> None:
        raise NvmlError("Not Supported")

    return SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=lambda: is_open.append(True),
        nvmlShutdown=lambda: is_open.append(False),
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}",
        nvmlDeviceGetTotalEnergyConsumption=refuse,
    )


def no_nvml() -> None:
    raise MeterUnavailable("nvidia-ml-py is not installed")


@pytest.mark.parametrize("has_gpus", [False, True])
@pytest.mark.parametrize(
    ("config", "says"),
    [
        (MeteringConfig(carbon=-5.0), "carbon: grams per kWh must be at least 0 and finite, got -5.0"),
        (MeteringConfig(carbon=math.nan), "carbon: grams per kWh must be at least 0 and finite, got nan"),
        (MeteringConfig(meter="replay:/nonexistent"), "meter: cannot read '/nonexistent'"),
        (MeteringConfig(meter="nvml"), "meter: nvidia-ml-py is not installed"),
    ],
)
def test_what_cannot_be_is_refused_naming_the_field(
    monkeypatch: pytest.MonkeyPatch, config: MeteringConfig, says: str, has_gpus: bool
) -> None:
    monkeypatch.setattr("tetrion.engine.energy.meters.nvml._import_nvml", no_nvml)
    with pytest.raises(ValueError, match=f"^{says}"):
        check_metering(config, has_gpus)


@pytest.mark.parametrize("has_gpus", [False, True])
def test_meters_that_are_there_are_accepted(tmp_path: Path, has_gpus: bool) -> None:
    (tmp_path / "readings").write_text('{"time_s": 0, "joules": {"GPU-a": 1}, "watts": {}}\n')
    for meter in ("auto", "model", "none", f"replay:{tmp_path / 'readings'}"):
        for carbon in (None, 0.0, 350.0):
            check_metering(MeteringConfig(meter=meter, carbon=carbon), has_gpus)


def test_which_gpus_nvml_must_meter_is_not_known_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    is_open: list[bool] = []
    monkeypatch.setattr(
        "tetrion.engine.energy.meters.nvml._import_nvml", lambda: nvml_with_gpus_without_counters(is_open)
    )
    check_metering(MeteringConfig(meter="nvml"), has_gpus=True)
    with pytest.raises(ValueError, match=r"^meter: GPU GPU-0 has no energy counter"):
        check_metering(MeteringConfig(meter="nvml"), has_gpus=False)
    assert is_open == [True, False, True, False]
