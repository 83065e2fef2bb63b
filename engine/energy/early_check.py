"""What a metering configuration asks for, checked before there are workers, whose start takes long.

Knows no GPU's UUID: that NVML meters the very GPUs of the workers is found when the meter is opened (`metering.py`).
"""

import math

from tetrion.engine.config import MeteringConfig
from tetrion.engine.energy.metering import open_meter
from tetrion.engine.energy.meters.base import MeterUnavailable
from tetrion.engine.energy.meters.nvml import NvmlMeter


class MeteringError(ValueError):
    """What was found to be wrong with the meter only after the workers had started; names the field."""


def check_metering(config: MeteringConfig, has_gpus: bool) -> None:
    """Raises ValueError naming the field. Leaves nothing open."""
    if config.carbon is not None and not 0 <= config.carbon < math.inf:
        raise ValueError(f"carbon: grams per kWh must be at least 0 and finite, got {config.carbon}")
    if config.meter == "nvml" and has_gpus:
        _check_nvml()
    elif config.meter != "auto":
        open_meter(config.meter, ()).close()


def _check_nvml() -> None:
    """That it is there, whatever the GPUs that it shows and the engine does not use."""
    try:
        NvmlMeter(()).close()
    except MeterUnavailable as error:
        raise ValueError(f"meter: {error}") from None
