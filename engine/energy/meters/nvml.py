"""The `nvml` meter: every GPU's own energy counter and power, through nvidia-ml-py.

The counter (`nvmlDeviceGetTotalEnergyConsumption`, millijoules since the driver was loaded) moves about every 100 ms.
To ask it takes 4 ms of a core on an H100, power 0.06 ms (`benchmarks/results/meter-cost-h100-x2.json`).
`nvmlDeviceGetPowerUsage` is a mean over a second on newer GPUs, so the field of instantaneous power is asked first.
Nothing is ever set: power limits and clocks stay as they are.
"""

import importlib
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from tetrion.engine.energy.meters.base import MeterUnavailable, Reading

RESOLUTION_S = 0.1
POWER_INSTANT = 186
"""NVML_FI_DEV_POWER_INSTANT, which older bindings do not name."""


class NvmlMeter:
    """Reads the GPUs with these UUIDs (None: all that NVML shows). Raises MeterUnavailable."""

    source = "nvml"
    resolution_s = RESOLUTION_S
    reason = ""

    def __init__(
        self,
        uuids: Sequence[str] | None = None,
        *,
        nvml: ModuleType | Any = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._nvml = nvml or _import_nvml()
        self._now_s = now_s
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            raise MeterUnavailable(f"NVML does not start: {error}") from None
        try:
            self._handles = self._open(uuids)
        except BaseException:
            self._nvml.nvmlShutdown()
            raise

    @property
    def uuids(self) -> tuple[str, ...]:
        return tuple(self._handles)

    def read(self, counters: bool = True) -> Reading:
        joules, watts = {}, {}
        for uuid, handle in self._handles.items():
            counter_mj = self._ask(self._nvml.nvmlDeviceGetTotalEnergyConsumption, handle) if counters else None
            if counter_mj is not None:
                joules[uuid] = counter_mj / 1e3
            if (power_mw := self._power_mw(handle)) is not None:
                watts[uuid] = power_mw / 1e3
        return Reading(time_s=self._now_s(), joules=joules, watts=watts)

    def close(self) -> None:
        self._handles = {}
        self._ask(self._nvml.nvmlShutdown)

    def _open(self, uuids: Sequence[str] | None) -> dict[str, Any]:
        nvml = self._nvml
        try:
            found = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
            by_uuid = {_text(nvml.nvmlDeviceGetUUID(handle)): handle for handle in found}
        except nvml.NVMLError as error:
            raise MeterUnavailable(f"NVML does not name its GPUs: {error}") from None
        wanted = list(by_uuid) if uuids is None else [canonical_uuid(uuid) for uuid in uuids]
        if missing := [uuid for uuid in wanted if uuid not in by_uuid]:
            raise MeterUnavailable(f"NVML shows no GPU {missing[0]} (a part of a GPU has no counter of its own)")
        for uuid in wanted:
            if self._ask(nvml.nvmlDeviceGetTotalEnergyConsumption, by_uuid[uuid]) is None:
                raise MeterUnavailable(f"GPU {uuid} has no energy counter")
        return {uuid: by_uuid[uuid] for uuid in dict.fromkeys(wanted)}

    def _power_mw(self, handle: Any) -> float | None:
        values = self._ask(self._nvml.nvmlDeviceGetFieldValues, handle, [POWER_INSTANT])
        if values and values[0].nvmlReturn == 0 and values[0].value.uiVal > 0:
            return float(values[0].value.uiVal)
        return self._ask(self._nvml.nvmlDeviceGetPowerUsage, handle)

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return question(*arguments)
        except self._nvml.NVMLError:
            return None


def canonical_uuid(uuid: str) -> str:
    """As NVML writes it; CUDA's runtime leaves the prefix out."""
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def _import_nvml() -> Any:
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        raise MeterUnavailable("nvidia-ml-py is not installed; pip install nvidia-ml-py") from None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
