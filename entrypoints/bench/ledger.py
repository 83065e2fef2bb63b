"""What the engine's energy account adds up to, for the record of a benchmark."""

from typing import Any

from tetrion.engine.api import EngineStats


def ledger_facts(stats: EngineStats) -> dict[str, Any]:
    """Joules since the engine's start, over all closed windows: `counter_j` = active + idle + unattributed but for
    `worst_identity_error`, of any window and as a share. Before rescaling, over all windows: `unattributed_share` of
    active joules, and `raw_error` and `model_error`, power samples (their mean distance) and the profile's joules
    against the counter. `sampler_core_share`: CPU time of metering. None: not known."""
    figures, cost = stats.energy, stats.metering_cost
    return {
        "num_windows": figures.num_windows,
        "counter_j": figures.counter_j,
        "active_j": None if figures.active_j is None else sum(figures.active_j.values()),
        "idle_j": figures.idle_j,
        "unattributed_j": figures.unattributed_j,
        "unattributed_share": figures.overall.unattributed_share,
        "worst_identity_error": figures.worst_identity_error,
        "raw_error": figures.overall.raw_error,
        "model_error": figures.overall.model_error,
        "sampler_core_share": cost.core_share if cost.num_readings else None,
    }
