"""The server's log on stderr: plain text or one JSON object a line, each with the request that it is about.

`drawn` is the line of a picture that was handed over; its figures are fields of their own in JSON.
"""

import logging
import time
from collections.abc import Mapping
from itertools import groupby
from typing import Any, Literal

import msgspec

from tetrion.engine.request import Delivered, ImageResult
from tetrion.entrypoints.http.connections import LOGGER
from tetrion.entrypoints.http.request_ids import RequestIdFilter

LogFormat = Literal["plain", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
PLAIN = "%(asctime)s %(levelname)s %(name)s: %(request)s%(message)s"
FIELDS = "fields"
"""Attribute of a record: a mapping with what its message says, for machines."""
QUIET = ("uvicorn.error", "asyncio", "httpx", "httpcore", "urllib3", "filelock", "PIL", "matplotlib")
"""Libraries whose chatter below WARNING is not the server's log."""

log = logging.getLogger("tetrion.http")


class JsonFormatter(logging.Formatter):
    """`time` (UTC, ISO 8601), `level`, `logger`, `message`; `request_id`, `tenant` and the record's fields if it has
    any; `error`: a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name in ("request_id", "tenant") if (value := getattr(record, name, ""))}
        line |= getattr(record, FIELDS, {})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def set_up(level: LogLevel = "info", log_format: LogFormat = "plain") -> None:
    """What is logged in this process goes to stderr from now on, unless somebody has already said where to."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(PLAIN))
    handler.addFilter(RequestIdFilter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger(LOGGER).setLevel(logging.ERROR)
    logging.getLogger("uvicorn.access").setLevel(logging.INFO)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


def drawn(result: ImageResult, delivered: Delivered) -> None:
    """A picture whose last byte has left. `result`: without the image, so that it is not kept."""
    if not log.isEnabledFor(logging.INFO):
        return
    fields = {
        "picture": result.request_id,
        "model": result.model,
        "size": f"{result.width}x{result.height}",
        "num_steps": result.num_steps,
        "degrees": result.degrees,
        "latency_s": round(delivered.latency_s, 4),
        "queue_s": round(result.queue_s, 4),
        "encode_s": round(result.encode_s, 4),
        "denoise_s": round(result.denoise_s, 4),
        "decode_s": round(result.decode_s, 4),
        "deliver_s": round(delivered.deliver_s, 4),
        "slo_met": delivered.slo_met,
        "joules": _joules(result),
    }
    log.info("%s", _text(fields), extra={FIELDS: fields})


def _joules(result: ImageResult) -> float | None:
    receipt = result.energy
    if receipt.active_j is None or receipt.idle_share_j is None:
        return None
    return round(receipt.active_j + receipt.idle_share_j, 3)


def _text(fields: Mapping[str, Any]) -> str:
    kept = {None: "", True: ", deadline met", False: ", deadline missed"}[fields["slo_met"]]
    joules = "" if fields["joules"] is None else f", {fields['joules']:.4g} J"
    return (
        f"{fields['picture']}: drew {fields['model']} {fields['size']}, {fields['num_steps']} steps at"
        f" {degrees_text(fields['degrees'])}; {fields['latency_s']:.3f} s to the last byte, {fields['queue_s']:.3f}"
        f" queued, {fields['deliver_s']:.3f} after it was drawn{kept}{joules}"
    )


def degrees_text(degrees: tuple[int, ...]) -> str:
    """`degree 2`, or runs of them: `degrees 1×4, 2×12`."""
    runs = [(degree, len(list(steps))) for degree, steps in groupby(degrees)]
    if len(runs) == 1:
        return f"degree {runs[0][0]}"
    return "degrees " + ", ".join(f"{degree}×{number}" for degree, number in runs)
