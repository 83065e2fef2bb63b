"""What the account says of all requests together: `EnergyFigures`, and the sums behind it (`Totals`)."""

from collections import defaultdict
from collections.abc import Iterable

import msgspec

from tetrion.engine.energy.gpu_ledger import Settled, Window
from tetrion.engine.stages import Stage

TotalKey = tuple[str, str, Stage]
"""(Model, cost key, stage)."""


class MeterErrors(msgspec.Struct, frozen=True, kw_only=True):
    """How well some windows' joules are known, before rescaling, as shares; None: not known. `unattributed_share`: of
    active joules. `raw_error` and `model_error`: power samples, and the profile's joules, against the counter."""

    unattributed_share: float | None = None
    raw_error: float | None = None
    model_error: float | None = None


class EnergyFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over all closed windows since the start; joules are None where there is no meter (`reason`).

    `active_j` by (model, cost key, phase). `worst_identity_error`: of any window, as a share of its counter. `latest`:
    of each GPU's latest window; `overall`: of all. `cpu_j`: of CPU packages, where they may be read.
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
    latest: MeterErrors = MeterErrors()
    overall: MeterErrors = MeterErrors()
    idle_w: dict[str, float] = {}
    cpu_j: float | None = None
    cpu_reason: str = ""


class _Sums:
    """Of windows, what their errors are worked out from."""

    def __init__(self) -> None:
        self.counter_j = self.off_j = self.raw_active_j = self.raw_unattributed_j = 0.0
        self.known_active_j = self.model_j = 0.0

    def add(self, window: Window) -> None:
        if window.raw_error is not None:
            self.counter_j += window.counter_j
            self.off_j += window.counter_j * window.raw_error
        self.raw_active_j += window.raw_active_j
        self.raw_unattributed_j += window.raw_unattributed_j
        if window.model_j is not None:  # the profile knows all that ran in it
            self.known_active_j += window.active_j
            self.model_j += window.model_j

    @property
    def errors(self) -> MeterErrors:
        return MeterErrors(
            unattributed_share=self.raw_unattributed_j / self.raw_active_j if self.raw_active_j else None,
            raw_error=self.off_j / self.counter_j if self.counter_j else None,
            model_error=self.model_j / self.known_active_j - 1 if self.known_active_j else None,
        )


class Totals:
    def __init__(self) -> None:
        self.active_j: dict[TotalKey, float] = defaultdict(float)
        self.idle_j = self.unattributed_j = self.counter_j = 0.0
        self.num_windows = 0
        self.worst_identity_error = 0.0
        self._sums = _Sums()

    def add(self, settled: Settled) -> None:
        window = settled.window
        if window is None:
            return
        for share, joules in settled.joules.items():
            self.active_j[share.model, share.cost_key, share.phase] += joules
        self.idle_j += window.idle_j
        self.unattributed_j += window.unattributed_j
        self.counter_j += window.counter_j
        self.num_windows += 1
        self.worst_identity_error = max(self.worst_identity_error, window.identity_error)
        self._sums.add(window)

    @property
    def errors(self) -> MeterErrors:
        return self._sums.errors


def errors_of(windows: Iterable[Window]) -> MeterErrors:
    sums = _Sums()
    for window in windows:
        sums.add(window)
    return sums.errors
