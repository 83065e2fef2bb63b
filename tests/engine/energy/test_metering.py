"""From configuration to an account: where the carbon intensity comes from."""

import pytest

from tetrion.engine.config import MeteringConfig
from tetrion.engine.energy.metering import Metering


@pytest.mark.parametrize(
    ("carbon", "said", "intensity"),
    [(350.0, None, 350.0), (None, 120.0, 120.0), (350.0, 120.0, 120.0), (0.0, None, 0.0)],
)
def test_the_intensity_is_the_configs_number_or_what_the_embedder_says(
    carbon: float | None, said: float | None, intensity: float
) -> None:
    config = MeteringConfig(meter="model", carbon=carbon)
    metering = Metering(config, (0,), {}, None if said is None else lambda: said)
    assert metering.account._g_per_kwh is not None and metering.account._g_per_kwh() == intensity


def test_without_an_intensity_receipts_do_not_speak_of_carbon() -> None:
    assert Metering(MeteringConfig(meter="model"), (0,), {}).account._g_per_kwh is None
