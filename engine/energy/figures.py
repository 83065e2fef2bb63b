"""What the account says of all requests together: `EnergyFigures`, and the sums behind it (`Totals`)."""

from collections import defaultdict
from collections.abc import Sequence

import msgspec

from tetrion.engine.energy.gpu_ledger import Settled, Window
from tetrion.engine.energy.quantum import Phase

TotalKey = tuple[tuple[int, int], Phase]
"""(Size in pixels, phase)."""


class EnergyFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over all closed windows since the start; joules are None where there is no meter (`reason`).

    `active_j` by (size, phase). `worst_identity_error`: of any window, as a share of its counter; `unattributed_share`:
    of active joules, before rescaling, `raw_error` and `model_error`: power samples, and the profile's joules, against
    the counter, all three of the latest windows. `cpu_j`: of CPU packages, where they may be read.
    """

    source: str
    reason: str
    active_j: dict[TotalKey, float] | None
    idle_j: float | None
    unattributed_j: float | None
    counter_j: float | None
    watts: dict[str, float]
    num_windows: int = 0
    worst_identity_error: float | None = None
    unattributed_share: float | None = None
    raw_error: float | None = None
    model_error: float | None = None
    idle_w: dict[str, float] = {}
    cpu_j: float | None = None
    cpu_reason: str = ""


class Totals:
    def __init__(self) -> None:
        self.active_j: dict[TotalKey, float] = defaultdict(float)
        self.idle_j = self.unattributed_j = self.counter_j = 0.0
        self.num_windows = 0
        self.worst_identity_error = 0.0

    def add(self, settled: Settled) -> None:
        window = settled.window
        if window is None:
            return
        for share, joules in settled.joules.items():
            self.active_j[share.size, share.phase] += joules
        self.idle_j += window.idle_j
        self.unattributed_j += window.unattributed_j
        self.counter_j += window.counter_j
        self.num_windows += 1
        self.worst_identity_error = max(self.worst_identity_error, window.identity_error)


def unattributed_share(windows: Sequence[Window]) -> float | None:
    active_j = sum(window.raw_active_j for window in windows)
    return sum(window.raw_unattributed_j for window in windows) / active_j if active_j else None


def model_error(windows: Sequence[Window]) -> float | None:
    """The profile's joules against the counter's for the same quanta, before rescaling to the profile."""
    if not windows or any(window.model_j is None for window in windows):
        return None
    active_j = sum(window.active_j for window in windows)
    return sum(window.model_j or 0.0 for window in windows) / active_j - 1 if active_j else None
