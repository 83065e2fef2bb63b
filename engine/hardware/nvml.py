"""How the GPUs are set and how warm they are, for the records of measurements; how much memory they have.

Asks NVML, of which `gpus.py` knows only names; where it is not there, nothing is known.
"""

import contextlib
import importlib
from collections.abc import Callable
from typing import Any, TypeVar

GpuFacts = dict[str, Any]
_T = TypeVar("_T")


def gpu_facts() -> list[GpuFacts]:
    """One dict a GPU, in NVML's order; MHz, W, °C. What a GPU does not tell is None."""
    return _of_each_gpu(lambda nvml, gpu: {"driver": _text(nvml.nvmlSystemGetDriverVersion()), **_facts(nvml, gpu)})


def largest_gpu_bytes() -> int | None:
    """All memory of the GPU of this machine that has most; None if that is not known."""
    return max(_of_each_gpu(lambda nvml, gpu: int(nvml.nvmlDeviceGetMemoryInfo(gpu).total)), default=None)


def _of_each_gpu(ask: Callable[[Any, Any], _T]) -> list[_T]:
    """`ask(nvml, gpu)` of all; without those from the first on that cannot be asked."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return []
    answers: list[_T] = []
    with contextlib.suppress(nvml.NVMLError):
        nvml.nvmlInit()
        try:
            for index in range(nvml.nvmlDeviceGetCount()):
                answers.append(ask(nvml, nvml.nvmlDeviceGetHandleByIndex(index)))
        finally:
            nvml.nvmlShutdown()
    return answers


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
