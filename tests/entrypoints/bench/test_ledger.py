"""What the account adds up to, in a benchmark's record."""

from types import SimpleNamespace

import pytest

from tetrion.engine.energy.figures import EnergyFigures, MeterErrors
from tetrion.engine.energy.sampler import SamplerCost
from tetrion.entrypoints.bench.ledger import ledger_facts


def test_shares_are_of_all_windows() -> None:
    figures = EnergyFigures(
        source="nvml",
        reason="",
        active_j={("shapes", "256x256", "denoise"): 700.0, ("shapes", "512x512", "decode"): 100.0},
        idle_j=180.0,
        unattributed_j=20.0,
        counter_j=1000.0,
        watts={},
        num_windows=3,
        worst_identity_error=1e-12,
        latest=MeterErrors(unattributed_share=0.5, raw_error=0.5, model_error=0.5),
        overall=MeterErrors(unattributed_share=0.03, raw_error=0.02, model_error=-0.01),
    )
    stats = SimpleNamespace(energy=figures, metering_cost=SamplerCost(10, 0.02, 5.0))
    facts = ledger_facts(stats)  # type: ignore[arg-type]
    assert facts["active_j"] + facts["idle_j"] + facts["unattributed_j"] == facts["counter_j"]
    assert (facts["unattributed_share"], facts["raw_error"], facts["model_error"]) == (0.03, 0.02, -0.01)
    assert facts["sampler_core_share"] == pytest.approx(0.004)
