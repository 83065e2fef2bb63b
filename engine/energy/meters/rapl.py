"""The `rapl` meter: joules of CPU packages from Linux' powercap files, where they may be read (often only by root).

Names are `cpu-package-0`, …, never GPU UUIDs, so that CPU energy is never mistaken for a GPU's. There are no watts.
"""

import time
from collections.abc import Callable
from pathlib import Path

from tetrion.engine.energy.meters.base import MeterUnavailable, Reading

FOLDER = Path("/sys/class/powercap")
RESOLUTION_S = 0.001


class RaplMeter:
    """All packages. Raises MeterUnavailable where there is none that this process may read."""

    source = "rapl"
    resolution_s = RESOLUTION_S
    reason = ""

    def __init__(self, folder: Path = FOLDER, *, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._packages: dict[str, _Package] = {}
        for path in sorted(folder.glob("intel-rapl:[0-9]*")):
            if path.name.count(":") == 1 and (package := _open(path)) is not None:
                self._packages[f"cpu-{package.name}"] = package
        if not self._packages:
            raise MeterUnavailable(f"no CPU energy counter under {folder} may be read")

    @property
    def uuids(self) -> tuple[str, ...]:
        return tuple(self._packages)

    def read(self, counters: bool = True) -> Reading:
        joules = {name: value for name, package in self._packages.items() if (value := package.joules()) is not None}
        return Reading(time_s=self._now_s(), joules=joules, watts={})

    def close(self) -> None:
        """Nothing is held open."""


class _Package:
    """One counter that starts again at 0 after `range_uj`; it has to be read at least once in each such period."""

    def __init__(self, name: str, counter: Path, range_uj: int) -> None:
        self.name = name
        self._counter = counter
        self._range_uj = range_uj
        self._last_uj = int(counter.read_text())
        self._sum_uj = 0

    def joules(self) -> float | None:
        try:
            now_uj = int(self._counter.read_text())
        except (OSError, ValueError):
            return None
        self._sum_uj += now_uj - self._last_uj + (self._range_uj if now_uj < self._last_uj else 0)
        self._last_uj = now_uj
        return self._sum_uj / 1e6


def _open(path: Path) -> _Package | None:
    try:
        name = (path / "name").read_text().strip()
        if not name.startswith("package"):
            return None
        return _Package(name, path / "energy_uj", int((path / "max_energy_range_uj").read_text()))
    except (OSError, ValueError):
        return None
