"""Grams of CO₂e per kWh, if the operator has set an intensity up: a number, a CSV by hour, or an HTTP service.

    350                                   g/kWh, always
    /etc/tetrion/intensity.csv            lines `HOUR,g_per_kwh`: HOUR is 0 to 23 (each day, UTC) or an ISO time
    https://…/latest                      JSON `{"g_per_kwh": 350}`; a token, read from a file, goes as Bearer

What Python reads as a number is one, whatever files there are. A service is asked in a thread of its own, never while
somebody waits, and its redirects are not followed: the token would go with them. Until it has answered, and when its
last answer is older than `MAX_AGE_S`, the intensity is unknown.
"""

import csv
import datetime
import io
import json
import logging
import math
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)
REFRESH_S = 300.0
MAX_AGE_S = 3600.0
MAX_ANSWER_BYTES = 1 << 16
CLOSE_WITHIN_S = 1.0
MAX_QUOTED = 80


class Intensity(Protocol):
    def start(self) -> None:
        """Begin to ask, if somebody is to be asked."""

    def g_per_kwh(self) -> float | None:
        """Now; None if it is not known."""

    def close(self) -> None: ...


class StaticIntensity:
    def __init__(self, g_per_kwh: float) -> None:
        """Raises ValueError."""
        self._g_per_kwh = _checked(g_per_kwh, "carbon")

    def start(self) -> None:
        """Nobody is asked."""

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
        """Raises ValueError naming field, file and line."""
        self._now = now
        self._by_hour: dict[int | datetime.datetime, float] = {}
        lines = csv.reader(io.StringIO(_read_text(path, "carbon"), newline=""))
        try:
            for row in lines:
                if row and not (lines.line_num == 1 and row[0].strip().lower() in ("hour", "time")):
                    self._add(row, f"carbon: {path}: line {lines.line_num}")
        except csv.Error as error:
            raise ValueError(f"carbon: {path}: line {lines.line_num}: {error}") from None
        if not self._by_hour:
            raise ValueError(f"carbon: {path}: has no line HOUR,g_per_kwh")

    def _add(self, row: list[str], where: str) -> None:
        try:
            hour, value = row[0].strip(), float(row[1])
            key = int(hour) if hour.isdecimal() else _utc_hour(datetime.datetime.fromisoformat(hour))
        except (ValueError, IndexError):
            raise ValueError(f"{where}: expected HOUR,g_per_kwh, got {','.join(row)[:MAX_QUOTED]!r}") from None
        if isinstance(key, int) and not 0 <= key <= 23:
            raise ValueError(f"{where}: hour must be from 0 to 23, got {key}")
        self._by_hour[key] = _checked(value, where)

    def start(self) -> None:
        """Nobody is asked."""

    def g_per_kwh(self) -> float | None:
        now = _utc_hour(self._now())
        return self._by_hour.get(now, self._by_hour.get(now.hour))

    def close(self) -> None:
        """Nothing is open."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer that tells nothing."""

    def redirect_request(self, *_: Any) -> None:
        """Makes no request."""


class HttpIntensity:
    """From a service, asked from `start` on. `token` goes in the header `Authorization: Bearer …`."""

    def __init__(self, url: str, token: str = "", timeout_s: float = 5.0, refresh_s: float = REFRESH_S) -> None:
        """Raises ValueError for a URL that can never be asked."""
        if reason := _why_not(url):
            raise ValueError(f"carbon: cannot ask {url!r}: {reason}")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._request = urllib.request.Request(url, headers=headers | {"Accept": "application/json"})
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._timeout_s, self._refresh_s = timeout_s, refresh_s
        self._known: tuple[float, float] | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tetrion-carbon", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def g_per_kwh(self) -> float | None:
        known = self._known
        return known[1] if known is not None and time.monotonic() - known[0] <= MAX_AGE_S else None

    def close(self) -> None:
        """Whoever waits for an answer longer than `CLOSE_WITHIN_S` is left behind."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_WITHIN_S)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._known = time.monotonic(), self._ask()
            except Exception as error:  # one bad answer, whatever is wrong with it, must not be the last
                reason = f"{type(error).__name__}: {error}"
                logger.warning("carbon intensity: %s does not tell: %s", self._request.full_url, reason)
            self._stopping.wait(self._refresh_s)

    def _ask(self) -> float:
        with self._opener.open(self._request, timeout=self._timeout_s) as answer:
            return _checked(float(json.loads(answer.read(MAX_ANSWER_BYTES))["g_per_kwh"]), "g_per_kwh")


def find_intensity(source: str, token_file: str | None = None, timeout_s: float = 5.0) -> Intensity:
    """What `source` names (see above), not started. Raises ValueError naming the field."""
    text = source.strip()
    if not text:
        raise ValueError("carbon: must not be empty; expected grams per kWh, a CSV file or a URL")
    if text.lower().startswith(("http://", "https://")):
        return HttpIntensity(text, _read_token(token_file), timeout_s)
    try:
        g_per_kwh = float(text)
    except ValueError:
        return HourlyIntensity(Path(text))
    return StaticIntensity(g_per_kwh)


def _why_not(url: str) -> str:
    """Why `url` can never be asked; empty if it can."""
    if not _is_one_word(url):
        return "it must be ASCII without spaces"
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").encode("idna"), parts.port
    except ValueError as error:
        return str(error)
    if "@" in parts.netloc or "%" in parts.netloc:
        return "its host must be plain, without user, password or %"
    return "" if host and port != 0 else "it names no host, or port 0"


def _read_token(path: str | None) -> str:
    if path is None:
        return ""
    token = _read_text(Path(path), "carbon_token_file").strip()
    if not _is_one_word(token):
        raise ValueError(f"carbon_token_file: {path!r} must hold one line of ASCII without spaces")
    return token


def _read_text(path: Path, field: str) -> str:
    """Raises ValueError naming field and file."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{field}: {str(path)!r} is not UTF-8 text: {error}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        raise ValueError(f"{field}: cannot read {str(path)!r}: {getattr(error, 'strerror', error)}") from None


def _is_one_word(text: str) -> bool:
    return bool(text) and text.isascii() and text.isprintable() and " " not in text


def _utc_hour(time_: datetime.datetime) -> datetime.datetime:
    aware = time_ if time_.tzinfo is not None else time_.replace(tzinfo=datetime.UTC)
    return aware.astimezone(datetime.UTC).replace(minute=0, second=0, microsecond=0)


def _checked(g_per_kwh: float, where: str) -> float:
    if not 0 <= g_per_kwh < math.inf:
        raise ValueError(f"{where}: grams per kWh must be at least 0 and finite, got {g_per_kwh}")
    return g_per_kwh
