"""What a server with OpenAI's image API does under load, as its clients see it: `tetrion bench serve --url URL`.

*Closed loop*: so many clients (`concurrency`), each of which asks again once it has its picture. *Open loop*: requests
come at their times whatever became of those before (`rate`), and latency counts from then. Nothing of the server's own
is needed; what an answer says of its stages is shown beside.
"""

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tetrion.entrypoints.bench import arrivals
from tetrion.entrypoints.bench.image_client import Answer, ImageClient, InputFile
from tetrion.entrypoints.bench.live import HEAD_START_S, joules_of, sleep_until
from tetrion.entrypoints.bench.simulation import prompt_of
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.record import as_text, check_writable, make_record, write_record

Row = dict[str, Any]
PERCENTILES = (50, 90, 99)
STAGES = ("queue_s", "encode_s", "denoise_s", "decode_s", "deliver_s")
"""What a Tetrion server says of a picture's time; `latency_s` is the whole of it."""
MAX_FILE_BYTES = 64 * 2**20
COLUMNS = (
    "size",
    "sent",
    "answered",
    "refused",
    "failed",
    "p50 s",
    "p90 s",
    "p99 s",
    "first byte",
    "pictures/s",
    "SLO",
)


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """`rate_per_min`: None: closed loop of `concurrency`. `sizes`: WxH, taken in turn; (): the server's own."""

    num_requests: int = 20
    concurrency: int = 1
    rate_per_min: float | None = None
    process: arrivals.Arrivals = "poisson"
    burstiness: float = 2.0
    seed: int = 11
    sizes: tuple[str, ...] = ()
    warm_up: int = 1


class Sent(msgspec.Struct, frozen=True, kw_only=True):
    """One request: the size that was asked for, when it was to be sent (CLOCK_MONOTONIC), what came back."""

    size: str
    due_s: float
    answer: Answer

    @property
    def latency_s(self) -> float | None:
        """From when it was due to the answer's last byte; None: no pictures came."""
        if self.answer.error is not None or self.answer.last_byte_s is None:
            return None
        return self.answer.last_byte_s - self.due_s


def command(
    *, output: Path | None = None, as_json: bool = False, command_line: str = "tetrion bench serve", **asked: Any
) -> dict[str, Any]:
    """Measure, print the table (or one JSON object), write `output`. `asked`: of `measure`. Raises InputError for what
    the caller can put right."""
    check_writable(output, "output")
    found = measure(**asked)
    made = make_record(command_line, found.pop("rows")) | found
    write_record(made, output)
    print(as_text(made) if as_json else table(made))
    return made


def measure(
    *,
    url: str,
    load: Load,
    fields: dict[str, Any],
    api_key: str | None = None,
    prompts: Sequence[str] = (),
    images: Sequence[Path] = (),
    slo_s: float | None = None,
    timeout_s: float = 600.0,
) -> dict[str, Any]:
    """Run `load` against `url`: rows, and what they are of. `fields`: of each body. `prompts` are taken in turn, else
    each request has its own; `images` are sent with every request, which makes it an edit. Raises InputError."""
    files = [_read(path) for path in images]
    client = ImageClient(url, api_key, timeout_s)
    sent, elapsed_s, model = asyncio.run(_run(client, load, fields, prompts, files))
    about = {"url": client.url, "model": model, "load": msgspec.to_builtins(load), "slo_s": slo_s, "fields": fields}
    return {"rows": rows(sent, elapsed_s, slo_s), **about, "errors": _errors(sent)}


def _read(path: Path) -> InputFile:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"image: {path} is larger than {MAX_FILE_BYTES >> 20} MiB")
        return InputFile(path.name, path.read_bytes())
    except OSError as error:
        raise InputError(f"image: cannot read {path}: {error.strerror}") from None


async def _run(
    client: ImageClient, load: Load, fields: dict[str, Any], prompts: Sequence[str], files: Sequence[InputFile]
) -> tuple[list[Sent], float, str | None]:
    async with client:
        model = fields.get("model") or await client.first_model()
        if model is not None:
            fields = {"model": model} | fields

        async def ask(number: int, due_s: float | None = None) -> Sent:
            size = load.sizes[number % len(load.sizes)] if load.sizes else "auto"
            body = {"prompt": prompts[number % len(prompts)] if prompts else prompt_of(number)} | fields
            if load.sizes:
                body["size"] = size
            answer = await client.draw(body, files)
            return Sent(size=size, due_s=answer.begun_s if due_s is None else due_s, answer=answer)

        for number in range(load.warm_up * max(1, len(load.sizes))):
            first = (await ask(number)).answer
            if first.error is not None:
                raise InputError(f"url: the first request came to nothing: {first.error}")
        begun_s = time.monotonic()
        sent = await (_closed(load, ask) if load.rate_per_min is None else _open(load, load.rate_per_min, ask))
        return sent, time.monotonic() - begun_s, model


async def _closed(load: Load, ask: Callable[..., Any]) -> list[Sent]:
    numbers, sent = iter(range(load.num_requests)), []

    async def client() -> None:
        for number in numbers:
            sent.append(await ask(number))

    await asyncio.gather(*(client() for _ in range(load.concurrency)))
    return sent


async def _open(load: Load, rate_per_min: float, ask: Callable[..., Any]) -> list[Sent]:
    zero_s = time.monotonic() + HEAD_START_S

    async def one(number: int, at_s: float) -> Sent:
        await sleep_until(zero_s + at_s)
        sent: Sent = await ask(number, zero_s + at_s)
        return sent

    times_s = times(load, 60 / rate_per_min)
    return list(await asyncio.gather(*(one(number, float(at_s)) for number, at_s in enumerate(times_s))))


def times(load: Load, mean_s: float) -> np.ndarray:
    """When the requests of an open loop come, seconds from its start."""
    draw = np.random.default_rng(load.seed)
    match load.process:
        case "gamma":
            return arrivals.gamma(draw, load.num_requests, mean_s, load.burstiness)
        case "production":
            return arrivals.production(draw, load.num_requests, mean_s)
        case _:
            return arrivals.poisson(draw, load.num_requests, mean_s)


# Results ------------------------------------------------------------------------------------------------------------


def rows(sent: Sequence[Sent], elapsed_s: float, slo_s: float | None) -> list[Row]:
    """One of all requests, then one of each size where there are several."""
    sizes = list(dict.fromkeys(one.size for one in sorted(sent, key=lambda one: one.due_s)))
    groups = [("all", list(sent))] if len(sizes) > 1 else []
    groups += [(size, [one for one in sent if one.size == size]) for size in sizes]
    return [_row(size, group, elapsed_s, slo_s) for size, group in groups]


def _row(size: str, sent: Sequence[Sent], elapsed_s: float, slo_s: float | None) -> Row:
    """`latency_s` from when a request was due (closed loop: from its first byte); the others from its last byte to the
    answer's head, first preview and last byte. `within_slo`: share of all that were sent. `said_s`: medians of what
    the answers say of their time; `beside_s`: median of the latency beyond that (not of several pictures at once)."""
    good = [one for one in sent if one.latency_s is not None]
    latencies_s = [one.latency_s for one in good if one.latency_s is not None]
    since = [one.answer for one in good if one.answer.sent_s is not None]
    pictures = [picture for one in good for picture in one.answer.pictures]
    refused = sum(one.answer.is_refused for one in sent)
    return {
        "size": size,
        "requests": len(sent),
        "answered": len(good),
        "refused": refused,
        "failed": len(sent) - len(good) - refused,
        "pictures": len(pictures),
        "pictures_per_s": len(pictures) / elapsed_s,
        "latency_s": _spread(latencies_s),
        "first_byte_s": _spread([a.first_byte_s - a.sent_s for a in since if a.first_byte_s and a.sent_s]),
        "first_partial_s": _spread([a.first_partial_s - a.sent_s for a in since if a.first_partial_s and a.sent_s]),
        "last_byte_s": _spread([a.last_byte_s - a.sent_s for a in since if a.last_byte_s and a.sent_s]),
        "answer_bytes": statistics.mean(one.answer.num_bytes for one in good) if good else None,
        "within_slo": None if slo_s is None else sum(s <= slo_s for s in latencies_s) / len(sent),
        "said_s": {stage: _median([p[stage] for p in pictures if _is_number(p.get(stage))]) for stage in STAGES},
        "beside_s": _median([beside for one in good if (beside := _beside_s(one)) is not None]),
        "joules": _median([joules for picture in pictures if (joules := _joules(picture)) is not None]),
    }


def _beside_s(sent: Sent) -> float | None:
    """What the client waited beyond what the answer's picture says that it took."""
    said = [picture.get("latency_s") for picture in sent.answer.pictures]
    if len(said) != 1 or not _is_number(said[0]) or sent.latency_s is None:
        return None
    return sent.latency_s - float(said[0])  # type: ignore[arg-type]


def _joules(picture: dict[str, Any]) -> float | None:
    receipt = picture.get("energy")
    if not isinstance(receipt, dict):
        return None
    parts = [receipt.get(name) for name in ("active_j", "idle_share_j")]
    return joules_of(*parts) if all(map(_is_number, parts)) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    found = dict(zip((f"p{p}" for p in PERCENTILES), map(float, np.percentile(values, PERCENTILES)), strict=True))
    return {"mean": statistics.mean(values)} | found


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _errors(sent: Sequence[Sent]) -> dict[str, int]:
    return dict(Counter(one.answer.error for one in sent if one.answer.error is not None).most_common(20))


def table(made: dict[str, Any]) -> str:
    """One line a row, then what went wrong, then where the time of a picture went if the answers say it."""
    lines = ["".join(f"{name:<12}" for name in COLUMNS)]
    for row in made["rows"]:
        latency, first = row["latency_s"] or {}, row["first_byte_s"] or {}
        cells = [row["size"], *(str(row[key]) for key in ("requests", "answered", "refused", "failed"))]
        cells += [_text(latency.get(f"p{p}")) for p in PERCENTILES]
        cells += [_text(first.get("p50")), _text(row["pictures_per_s"]), _share(row["within_slo"])]
        lines.append("".join(f"{cell:<12}" for cell in cells).rstrip())
    lines += [f"{number} × {error}" for error, number in made["errors"].items()]
    for row in made["rows"]:
        said = {stage.removesuffix("_s"): s for stage, s in row["said_s"].items() if s is not None}
        if said and row["beside_s"] is not None:
            stages = ", ".join(f"{stage} {seconds * 1e3:.1f}" for stage, seconds in said.items())
            lines.append(f"{row['size']}: medians in ms by the answers: {stages}; beside {row['beside_s'] * 1e3:.1f}")
    return "\n".join(line.rstrip() for line in lines)


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
