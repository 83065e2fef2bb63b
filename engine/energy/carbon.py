"""Grams of CO₂e per kWh, if the operator has set an intensity up: a number, a CSV by hour, or an HTTP service.

    350                                   g/kWh, always
    /etc/tetrion/intensity.csv            lines `HOUR,g_per_kwh`: HOUR is 0 to 23 (each day, UTC) or an ISO time
    https://…/latest                      JSON `{"g_per_kwh": 350}`; a token, read from a file, goes as Bearer

A service is asked in a thread of its own, never while somebody waits. Until it has answered, and when its last answer
is older than `MAX_AGE_S`, the intensity is unknown.
"""

import csv
import datetime
import json
import logging
import math
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

logger = logging.getLogger(__name__)
REFRESH_S = 300.0
MAX_AGE_S = 3600.0
MAX_ANSWER_BYTES = 1 << 16


class Intensity(Protocol):
    def g_per_kwh(self) -> float | None:
        """Now; None if it is not known."""

    def close(self) -> None: ...


class StaticIntensity:
    def __init__(self, g_per_kwh: float) -> None:
        """Raises ValueError."""
        self._g_per_kwh = _checked(g_per_kwh, "carbon")

    def g_per_kwh(self) -> float | None:
        return self._g_per_kwh

    def close(self) -> None:
        """Nothing is open."""


class HourlyIntensity:
    """From a CSV file, read once. A line for the present hour (ISO) goes before one for the hour of the day."""

    def __init__(
        self,
        path: Path,
        now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
    ) -> None:
        """Raises ValueError naming file and line."""
        self._now = now
        self._by_hour: dict[int | datetime.datetime, float] = {}
        try:
            with path.open(newline="") as file:
                for number, row in enumerate(csv.reader(file), start=1):
                    if row and not (number == 1 and row[0].strip().lower() in ("hour", "time")):
                        self._add(row, f"{path}: line {number}")
        except OSError as error:
            raise ValueError(f"carbon: cannot read {str(path)!r}: {error.strerror}") from None

    def _add(self, row: list[str], where: str) -> None:
        try:
            hour, value = row[0].strip(), float(row[1])
            key = int(hour) if hour.isdecimal() else _utc_hour(datetime.datetime.fromisoformat(hour))
        except (ValueError, IndexError):
            raise ValueError(f"{where}: expected HOUR,g_per_kwh, got {','.join(row)!r}") from None
        if isinstance(key, int) and not 0 <= key <= 23:
            raise ValueError(f"{where}: hour must be from 0 to 23, got {key}")
        self._by_hour[key] = _checked(value, where)

    def g_per_kwh(self) -> float | None:
        now = _utc_hour(self._now())
        return self._by_hour.get(now, self._by_hour.get(now.hour))

    def close(self) -> None:
        """Nothing is open."""


class HttpIntensity:
    """From a service. `token` goes in the header `Authorization: Bearer …`."""

    def __init__(self, url: str, token: str = "", timeout_s: float = 5.0, refresh_s: float = REFRESH_S) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._request = urllib.request.Request(url, headers=headers | {"Accept": "application/json"})
        self._timeout_s, self._refresh_s = timeout_s, refresh_s
        self._known: tuple[float, float] | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tetrion-carbon", daemon=True)
        self._thread.start()

    def g_per_kwh(self) -> float | None:
        known = self._known
        return known[1] if known is not None and time.monotonic() - known[0] <= MAX_AGE_S else None

    def close(self) -> None:
        self._stopping.set()
        self._thread.join(self._timeout_s)

    def _run(self) -> None:
        while True:
            try:
                self._known = time.monotonic(), self._ask()
            except (OSError, ValueError, KeyError, TypeError) as error:
                logger.warning("carbon intensity: %s does not tell: %s", self._request.full_url, error)
            if self._stopping.wait(self._refresh_s):
                return

    def _ask(self) -> float:
        with urllib.request.urlopen(self._request, timeout=self._timeout_s) as answer:
            return _checked(float(json.loads(answer.read(MAX_ANSWER_BYTES))["g_per_kwh"]), "g_per_kwh")


def open_intensity(source: str | float, token_file: str | None = None, timeout_s: float = 5.0) -> Intensity:
    """What `source` names (see above). Raises ValueError."""
    text = str(source).strip()
    if text.startswith(("http://", "https://")):
        return HttpIntensity(text, _read_token(token_file), timeout_s)
    try:
        return StaticIntensity(float(text))
    except ValueError:
        if text.replace(".", "", 1).lstrip("-").isdecimal() or text in ("nan", "inf"):
            raise
        return HourlyIntensity(Path(text))


def _read_token(path: str | None) -> str:
    if path is None:
        return ""
    try:
        return Path(path).read_text().strip()
    except OSError as error:
        raise ValueError(f"carbon token: cannot read {path!r}: {error.strerror}") from None


def _utc_hour(time_: datetime.datetime) -> datetime.datetime:
    aware = time_ if time_.tzinfo is not None else time_.replace(tzinfo=datetime.UTC)
    return aware.astimezone(datetime.UTC).replace(minute=0, second=0, microsecond=0)


def _checked(g_per_kwh: float, where: str) -> float:
    if not 0 <= g_per_kwh < math.inf:
        raise ValueError(f"{where}: grams per kWh must be at least 0 and finite, got {g_per_kwh}")
    return g_per_kwh
