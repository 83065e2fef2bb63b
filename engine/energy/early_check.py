"""What a metering configuration asks for, checked before there are workers, whose start takes long.

Knows no GPU's UUID: that NVML meters the very GPUs of the workers is found when the meter is opened (`metering.py`).
"""

from tetrion.engine.config import MeteringConfig
from tetrion.engine.energy.carbon import find_intensity
from tetrion.engine.energy.metering import open_meter
from tetrion.engine.energy.meters.base import MeterUnavailable
from tetrion.engine.energy.meters.nvml import NvmlMeter


class MeteringError(ValueError):
    """What was found to be wrong with meter or carbon intensity only after the workers had started; names the field."""


def check_metering(config: MeteringConfig, has_gpus: bool) -> None:
    """Raises ValueError naming the field. Asks no service and leaves nothing open."""
    if config.carbon is not None:
        find_intensity(config.carbon, config.carbon_token_file, config.carbon_timeout_s)
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
