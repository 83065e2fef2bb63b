"""From configuration to a running energy account: `Metering` owns meter, sampler and account.

What a machine does not offer is not an error unless it was asked for by name: then the account knows why it is empty.
"""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

from tetrion.engine.config import MeteringConfig
from tetrion.engine.energy.account import EnergyAccount
from tetrion.engine.energy.meters.base import MODEL, EnergyMeter, MeterUnavailable, ModelMeter, NoMeter
from tetrion.engine.energy.meters.nvml import NvmlMeter, canonical_uuid
from tetrion.engine.energy.meters.rapl import RaplMeter
from tetrion.engine.energy.meters.replay import read_recording
from tetrion.engine.energy.sampler import Sampler, SamplerCost

IDLE_WITHIN_S = 3.0
"""GPUs that nobody else uses are quiet for long enough by then."""
POLL_S = 0.05
CPU_ONLY = "the devices are CPU workers, which have no energy counter of their own"


class Metering:
    """`gpu_uuids`: device id → UUID of its GPU, empty where devices are CPUs. `g_per_kwh`: in place of `config.carbon`
    (see `AsyncEngine`). Raises ValueError for a meter that was asked for by name and is not there."""

    def __init__(
        self,
        config: MeteringConfig,
        device_ids: tuple[int, ...],
        gpu_uuids: Mapping[int, str],
        g_per_kwh: Callable[[], float | None] | None = None,
    ) -> None:
        uuids = {device_id: canonical_uuid(uuid) for device_id, uuid in gpu_uuids.items()}
        self.meter = open_meter(config.meter, tuple(dict.fromkeys(uuids.values())))
        cpu_meter = _cpu_meter()
        self._reads_gpus = bool(self.meter.uuids) and self.meter.source != MODEL
        self._reads_cpu = not cpu_meter.reason
        self.account = EnergyAccount(
            self.meter,
            {device_id: uuids.get(device_id, _stand_in(self.meter, device_id)) for device_id in device_ids},
            cpu_meter=cpu_meter,
            g_per_kwh=g_per_kwh or (None if config.carbon is None else lambda: config.carbon),
            window_s=config.window_s,
        )
        self._sampler = Sampler(self.meter, self.account.receive, config.period_s)

    @property
    def cost(self) -> SamplerCost:
        """What sampling has cost so far."""
        return self._sampler.cost

    @property
    def age_s(self) -> float | None:
        """Seconds since the meter has last told joules; None for one that is not read."""
        return self._sampler.age_s if self._reads_gpus else None

    async def start(self) -> None:
        """Begin to read, if there is anything to read, while nothing runs. Returns once all GPUs were seen idle, or
        after `IDLE_WITHIN_S`: receipts of the first requests could not tell their share of it otherwise."""
        if self._reads_gpus or self._reads_cpu:
            self._sampler.start()
        for _ in range(round(IDLE_WITHIN_S / POLL_S) if self._reads_gpus else 0):
            if self.account.knows_idle:
                break
            await asyncio.sleep(POLL_S)

    def stop(self) -> None:
        self._sampler.stop()


def open_meter(name: str, uuids: tuple[str, ...]) -> EnergyMeter:
    """The meter that `MeteringConfig.meter` names, for these GPUs. Raises ValueError."""
    try:
        match name.partition(":"):
            case ("none", _, _):
                return NoMeter("metering is switched off")
            case ("model", _, _):
                return ModelMeter(uuids)
            case ("replay", _, path):
                return read_recording(Path(path))
            case ("nvml", _, _):
                return NvmlMeter(uuids or None)
            case _:
                return _auto(uuids)
    except MeterUnavailable as error:
        raise ValueError(f"meter: {error}") from None


def _auto(uuids: tuple[str, ...]) -> EnergyMeter:
    if not uuids:
        return NoMeter(CPU_ONLY)
    try:
        return NvmlMeter(uuids)
    except MeterUnavailable as error:
        return NoMeter(str(error))


def _stand_in(meter: EnergyMeter, device_id: int) -> str:
    """For a device that is no GPU: one of those in a recording, or a name."""
    return meter.uuids[device_id % len(meter.uuids)] if meter.uuids else f"device-{device_id}"


def _cpu_meter() -> EnergyMeter:
    try:
        return RaplMeter()
    except MeterUnavailable as error:
        return NoMeter(str(error))
