"""What a meter is: `EnergyMeter`, `Reading`; the one that says what the profile says (`ModelMeter`), and the
one that knows nothing (`NoMeter`).

Unknown is None with a reason, never 0: a reading lacks what the meter could not tell.
"""

from typing import Protocol

import msgspec

MODEL = "model"


class MeterUnavailable(RuntimeError):
    """This machine does not offer the meter; the message says why."""


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """One moment. `time_s`: CLOCK_MONOTONIC. `joules` counts up since some moment in the past, by GPU UUID; `watts` are
    those of the moment. A GPU that did not tell is not in them."""

    time_s: float
    joules: dict[str, float]
    watts: dict[str, float]


class EnergyMeter(Protocol):
    """Cumulative joules and instantaneous watts by UUID. `resolution_s`: how often the counter moves. `reason`: why
    nothing is known, empty where something is."""

    source: str
    resolution_s: float
    reason: str

    @property
    def uuids(self) -> tuple[str, ...]: ...

    def read(self, counters: bool = True) -> Reading:
        """One reading now. Never raises: what fails is left out. Without `counters` what costs much is left out too."""

    def close(self) -> None: ...


class ModelMeter:
    """Measures nothing: joules are those that the profile says, and are labelled so."""

    source = MODEL
    resolution_s = 0.0
    reason = ""

    def __init__(self, uuids: tuple[str, ...]) -> None:
        self.uuids = uuids

    def read(self, counters: bool = True) -> Reading:
        return Reading(time_s=0.0, joules={}, watts={})

    def close(self) -> None:
        """Nothing to close."""


class NoMeter:
    """Knows nothing, and why."""

    source = "none"
    resolution_s = 0.0
    uuids: tuple[str, ...] = ()

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def read(self, counters: bool = True) -> Reading:
        return Reading(time_s=0.0, joules={}, watts={})

    def close(self) -> None:
        """Nothing to close."""
