"""How the GPUs are set and how warm they are, for the records of measurements.

Asks NVML, of which `gpus.py` knows only names; where it is not there, nothing is known.
"""

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

GpuFacts = dict[str, Any]


def gpu_facts() -> list[GpuFacts]:
    """One dict a GPU, in NVML's order; MHz, W, °C. What a GPU does not tell is None."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return []
    facts: list[GpuFacts] = []
    with contextlib.suppress(nvml.NVMLError):
        nvml.nvmlInit()
        try:
            driver = _text(nvml.nvmlSystemGetDriverVersion())
            for index in range(nvml.nvmlDeviceGetCount()):
                facts.append({"driver": driver, **_facts(nvml, nvml.nvmlDeviceGetHandleByIndex(index))})
        finally:
            nvml.nvmlShutdown()
    return facts


def _facts(nvml: Any, gpu: Any) -> GpuFacts:
    def ask(question: Callable[[], Any]) -> Any:
        with contextlib.suppress(nvml.NVMLError):
            return question()
        return None

    power_mw = ask(lambda: nvml.nvmlDeviceGetPowerUsage(gpu))
    limit_mw = ask(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu))
    return {
        "name": _text(ask(lambda: nvml.nvmlDeviceGetName(gpu))),
        "uuid": _text(ask(lambda: nvml.nvmlDeviceGetUUID(gpu))),
        "sm_mhz": ask(lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)),
        "max_sm_mhz": ask(lambda: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM)),
        "memory_mhz": ask(lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM)),
        "power_w": None if power_mw is None else power_mw / 1e3,
        "power_limit_w": None if limit_mw is None else limit_mw / 1e3,
        "temperature_c": ask(lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)),
    }


def _text(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else value
