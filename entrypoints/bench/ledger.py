"""What the engine's energy account adds up to, for the record of a benchmark."""

from typing import Any

from tetrion.engine.api import EngineStats


def ledger_facts(stats: EngineStats) -> dict[str, Any]:
    """Joules since the engine's start, over all closed windows: `counter_j` = active + idle + unattributed but for
    `worst_identity_error`, of any window and as a share. `unattributed_share`: of active joules; `raw_error` and
    `model_error`: of the latest windows' power samples, and of the profile's joules, against the counter.
    `sampler_core_share`: CPU time of metering. None: not known."""
    figures, cost = stats.energy, stats.metering_cost
    active_j = None if figures.active_j is None else sum(figures.active_j.values())
    share = figures.unattributed_j / active_j if active_j and figures.unattributed_j is not None else None
    return {
        "num_windows": figures.num_windows,
        "counter_j": figures.counter_j,
        "active_j": active_j,
        "idle_j": figures.idle_j,
        "unattributed_j": figures.unattributed_j,
        "unattributed_share": share,
        "worst_identity_error": figures.worst_identity_error,
        "raw_error": figures.raw_error,
        "model_error": figures.model_error,
        "sampler_core_share": cost.core_share if cost.num_readings else None,
    }
