"""Pictures whose bytes are known, asked for at given times, and what became of each request.

Every picture of a catalogue is drawn twice while nothing else happens; that is the truth that every later answer is
compared with, byte for byte. Arrivals are Poisson and wait for nobody (`bench/live.py: open_loop`).
"""

import asyncio
import base64
import hashlib
import itertools
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import msgspec

from benchmarks.soak.server import Server
from tetrion.entrypoints.bench.live import HEAD_START_S, open_loop, sleep_until
from tetrion.entrypoints.bench.workloads import TraceRequest

GENERATIONS = "/v1/images/generations"
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "brown")
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
SIZES = ((128, 128), (192, 192), (256, 256), (128, 256), (256, 128))

Body = dict[str, Any]


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """What to ask for, and the SHA-256 of what has to come."""

    body: Body
    digest: str


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """`outcome`: right, wrong, lost (no whole answer), else status and code. Times in seconds; `due_s` from the start
    of the load, `latency_s` counted from it."""

    number: int
    due_s: float
    latency_s: float
    outcome: str


class Arrivals(msgspec.Struct, frozen=True, kw_only=True):
    """When which of the pictures is asked for, within `seconds`: the same again for the same arguments."""

    seconds: float
    trace: tuple[TraceRequest, ...]
    choices: tuple[int, ...]


def catalogue(count: int, seed: int, max_steps: int = 4, sizes: Sequence[tuple[int, int]] = SIZES) -> list[Body]:
    rng = random.Random(seed)

    def thing() -> str:
        return f"a {rng.choice(COLOURS)} {rng.choice(SHAPES)}"

    bodies = []
    for _ in range(count):
        width, height = rng.choice(sizes)
        body = {"prompt": f"{thing()} above {thing()}", "size": f"{width}x{height}", "seed": rng.randrange(2**32)}
        bodies.append(body | {"num_inference_steps": rng.randint(1, max_steps)})
    return bodies


def digest_of(answer: bytes) -> str:
    """Of an answer's pictures, their files' bytes."""
    data = json.loads(answer)["data"]
    return hashlib.sha256(b"".join(base64.b64decode(entry["b64_json"]) for entry in data)).hexdigest()


async def draw_undisturbed(server: Server, bodies: Sequence[Body]) -> list[Picture]:
    """Raises RuntimeError if the server does not draw one, or not the same twice."""

    async def digests(at_once: int) -> list[str]:
        gate = asyncio.Semaphore(at_once)

        async def one(body: Body) -> str:
            async with gate:
                answer = await server.http.post(GENERATIONS, json=body)
            if answer.status_code != 200:
                raise RuntimeError(f"undisturbed, {body} was answered {answer.status_code}: {answer.text[:300]}")
            return digest_of(answer.content)

        return await asyncio.gather(*map(one, bodies))

    first, second = await digests(4), await digests(2)
    if first != second:
        raise RuntimeError("undisturbed, a picture was not the same twice")
    return [Picture(body=body, digest=digest) for body, digest in zip(bodies, first, strict=True)]


async def capacity_per_s(server: Server, pictures: Sequence[Picture], seconds: float, at_once: int = 12) -> float:
    """Pictures a second that `at_once` clients get which ask again as soon as they are answered."""
    begun_s, count = time.monotonic(), 0
    numbers = itertools.count()

    async def ask() -> None:
        nonlocal count
        while time.monotonic() < begun_s + seconds:
            picture = pictures[next(numbers) % len(pictures)]
            outcome = await ask_for(server, picture)
            count += outcome == "right"

    await asyncio.gather(*(ask() for _ in range(at_once)))
    return count / (time.monotonic() - begun_s)


def poisson(pictures: Sequence[Picture], rate_per_s: float, seconds: float, seed: int) -> Arrivals:
    """Random pictures at random times."""
    rng, at_s, trace, choices = random.Random(seed), 0.0, [], []
    while (at_s := at_s + rng.expovariate(rate_per_s)) < seconds:
        choice = rng.randrange(len(pictures))
        body = pictures[choice].body
        width, height = map(int, body["size"].split("x"))
        steps = body["num_inference_steps"]
        trace.append(TraceRequest(arrival_s=at_s, width=width, height=height, num_steps=steps))
        choices.append(choice)
    return Arrivals(seconds=seconds, trace=tuple(trace), choices=tuple(choices))


async def run_load(server: Server, pictures: Sequence[Picture], arrivals: Arrivals, **more: Any) -> list[Answer]:
    """In the order of `arrivals`; when all have been answered and their time is over. `more`: of the bodies."""
    answers: dict[int, Answer] = {}
    zero_s = time.monotonic() + HEAD_START_S

    async def draw(request: TraceRequest, number: int) -> tuple[int, ...]:
        outcome = await ask_for(server, pictures[arrivals.choices[number]], **more)
        due_s = request.arrival_s
        latency_s = time.monotonic() - zero_s - due_s
        answers[number] = Answer(number=number, due_s=due_s, latency_s=latency_s, outcome=outcome)
        return ()

    await open_loop(arrivals.trace, zero_s, draw)
    await sleep_until(zero_s + arrivals.seconds)
    return [answers[number] for number in range(len(answers))]


async def ask_for(server: Server, picture: Picture, **more: Any) -> str:
    """The outcome (see `Answer`). `more`: of the body."""
    try:
        answer = await server.http.post(GENERATIONS, json=picture.body | more)
    except httpx.HTTPError:
        return "lost"
    if answer.status_code == 200:
        return "right" if digest_of(answer.content) == picture.digest else "wrong"
    return f"{answer.status_code} {code_of(answer.content)}"


def code_of(answer: bytes) -> str:
    """Of an error, "?" if it does not have OpenAI's form."""
    try:
        return str(json.loads(answer)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return "?"


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Counts of outcomes; latencies are those of answered pictures."""
    counts = Counter(answer.outcome for answer in answers)
    times_s = [answer.latency_s for answer in answers if answer.outcome in ("right", "wrong")]
    return {
        "sent": len(answers),
        "right": counts.pop("right", 0),
        "wrong": counts.pop("wrong", 0),
        "lost": counts.pop("lost", 0),
        "http_5xx": sum(count for outcome, count in counts.items() if outcome.startswith("5")),
        "others": dict(counts),
        "p50_s": statistics.median(times_s) if times_s else None,
        "p99_s": quantile(times_s, 0.99) if times_s else None,
        "max_s": max(times_s, default=None),
    }


def quantile(values: Sequence[float], share: float) -> float:
    """Nearest rank; of values that need not be sorted."""
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered), -int(-share * len(ordered) // 1)) - 1)]


def differences_s(undisturbed: Sequence[Answer], disturbed: Sequence[Answer]) -> list[float]:
    """How much later each request was answered than the same one of the undisturbed run; those without a picture in
    either are left out."""
    calm_s: Mapping[int, float] = {one.number: one.latency_s for one in undisturbed if one.outcome == "right"}
    return [one.latency_s - calm_s[one.number] for one in disturbed if one.outcome == "right" and one.number in calm_s]
