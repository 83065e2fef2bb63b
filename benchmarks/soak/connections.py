"""How a server answers `/health` beside connections that say nothing, or little; and what bodies that wait cost.

Opens silent and slow connections and asks for `/health` ten times a second on new ones until the server has closed
every one of the others. Then big bodies, all at once, while the workers are busy: how much memory does the server take?
"""

import asyncio
import json
import multiprocessing
import resource
import socket
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.soak import load
from benchmarks.soak.processes import figures_of
from benchmarks.soak.report import Check, Row, at_most, finish, none_of
from benchmarks.soak.server import Server, served

BODY = b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n\r\n"
HEAD = b"GET /health HTTP/1.1\r\nhost: localhost\r\na: "
PROBE = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
PERIOD_S = 0.1
LEAST_S = 2.0
"""So long /health is asked for, also where there is no crowd."""
AT_ONCE = 64
MOST_P99_MS = 100.0
KB_EACH = 64
"""Of the engine's memory, for a connection and its request apart from their bytes."""
SETTLE_S = 3.0
"""No answer has come, nothing was sent and the queue has not changed for so long: all that is taken waits."""
IDLE_WITHIN_S = 60.0
"""After all clients have hung up."""


class Crowd:
    """Connections of one kind: `first` is sent at once, then a byte a second if it is slow."""

    def __init__(self, address: tuple[str, int], first: bytes) -> None:
        self._address, self._first = address, first
        self.num_refused = 0
        self.closed_after_s: list[float] = []

    async def hold(self, gate: asyncio.Semaphore) -> None:
        try:
            async with gate:
                reader, writer = await asyncio.open_connection(*self._address)
        except OSError:
            self.num_refused += 1
            return
        begun_s, reading = time.monotonic(), asyncio.create_task(reader.read())
        try:
            writer.write(self._first)
            while not reading.done():
                await asyncio.wait([reading], timeout=1.0)
                if self._first and not reading.done():
                    writer.write(b"x")
            reading.exception()
            self.closed_after_s.append(time.monotonic() - begun_s)
        finally:
            reading.cancel()
            writer.close()

    def figures(self, num: int) -> dict[str, object]:
        longest_s = round(max(self.closed_after_s, default=0.0), 1)
        return {"opened": num, "refused": self.num_refused, "closed": len(self.closed_after_s), "longest_s": longest_s}


async def probe(address: tuple[str, int], times_s: list[float], errors: list[str]) -> None:
    while True:
        begun_s = time.monotonic()
        try:
            async with asyncio.timeout(10):
                reader, writer = await asyncio.open_connection(*address)
                writer.write(PROBE)
                answer = await reader.read()
                writer.close()
            if not answer.startswith(b"HTTP/1.1 200 "):
                errors.append(answer[:40].decode("latin-1"))
        except (OSError, TimeoutError) as error:
            errors.append(repr(error))
        times_s.append(time.monotonic() - begun_s)
        await asyncio.sleep(max(0.0, PERIOD_S - times_s[-1]))


async def hold_all(address: tuple[str, int], counts: dict[str, int], seconds: float) -> dict[str, dict[str, object]]:
    firsts = {"silent": b"", "slow_heads": HEAD, "slow_bodies": BODY}
    crowds = {kind: Crowd(address, first) for kind, first in firsts.items()}
    gate = asyncio.Semaphore(AT_ONCE)
    held = [asyncio.create_task(crowds[kind].hold(gate)) for kind, count in counts.items() for _ in range(count)]
    _, pending = await asyncio.wait([*held, asyncio.create_task(asyncio.sleep(LEAST_S))], timeout=seconds)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    return {kind: crowds[kind].figures(count) for kind, count in counts.items()}


def hold_in_process(*arguments: Any) -> dict[str, dict[str, object]]:
    return asyncio.run(hold_all(*arguments))


async def beside_crowds(address: tuple[str, int], counts: dict[str, int], seconds: float) -> Row:
    """The crowd has a process of its own, so that what it costs its own loop is not taken for the server's time."""
    times_s: list[float] = []
    errors: list[str] = []
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        holding = asyncio.get_running_loop().run_in_executor(pool, hold_in_process, address, counts, seconds)
        probing = asyncio.create_task(probe(address, times_s, errors))
        crowds = await holding
        probing.cancel()
    times_ms = [1000 * one for one in times_s]
    return {
        "probes": len(times_ms),
        "failed": errors[:10],
        "p50_ms": load.quantile(times_ms, 0.5),
        "p99_ms": load.quantile(times_ms, 0.99),
        "max_ms": max(times_ms),
        **crowds,
    }


def big_post(num_bytes: int) -> bytes:
    """A request for a picture whose body is `num_bytes` long, most of it in a field that nobody reads."""
    body: load.Body = {"prompt": "a star", "size": "512x512", "num_inference_steps": 1000, "filler": ""}
    body["filler"] = "a" * (num_bytes - len(json.dumps(body)))
    text = json.dumps(body).encode()
    head = (
        f"POST {load.GENERATIONS} HTTP/1.1",
        "host: localhost",
        "content-type: application/json",
        f"content-length: {len(text)}",
    )
    return "\r\n".join([*head, "", ""]).encode() + text


async def wait_with(address: tuple[str, int], post: bytes, gate: asyncio.Semaphore, statuses: Counter[str]) -> None:
    """Send one big body and wait for the answer, until cancelled. Sends from the one buffer: what the client holds
    would be memory, too."""
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.setblocking(False)
        try:
            async with gate:
                await loop.sock_connect(sock, address)
                await loop.sock_sendall(sock, post)
            answer = await loop.sock_recv(sock, 4096)
            statuses[answer[9:12].decode("latin-1") or "closed"] += 1
        except OSError:
            statuses["closed"] += 1


async def memory_of_waiting(server: Server, count: int, num_bytes: int, settle_s: float) -> Row:
    """The engine's private memory while `count` such bodies are sent and those that are taken wait; its highest value
    is what counts."""
    before = figures_of(server.process.pid)
    gate, statuses, post = asyncio.Semaphore(AT_ONCE), Counter[str](), big_post(num_bytes)
    sending = [asyncio.create_task(wait_with(server.address, post, gate, statuses)) for _ in range(count)]
    highest, quiet_since_s, last = before, time.monotonic(), (-1, -1)
    while time.monotonic() < quiet_since_s + settle_s:
        await asyncio.sleep(PERIOD_S)
        now = figures_of(server.process.pid)
        if now is not None and (highest is None or now.private_mb > highest.private_mb):
            highest = now
        seen = (statuses.total(), (await _ready(server)).get("num_queued", 0))
        if seen != last or gate.locked():
            last, quiet_since_s = seen, time.monotonic()
    waiting = sum(not task.done() for task in sending)
    is_well, ready = (await server.http.get("/health")).status_code, await _ready(server)
    for task in sending:
        task.cancel()
    await asyncio.gather(*sending, return_exceptions=True)
    gone_s = time.monotonic()
    with suppress(TimeoutError):
        async with asyncio.timeout(IDLE_WITHIN_S):
            while (after := await _ready(server)) and after["num_queued"] + after["num_admitted"]:  # noqa: ASYNC110
                await asyncio.sleep(PERIOD_S)
    assert before is not None and highest is not None
    return {
        "sent": count,
        "body_bytes": num_bytes,
        "waiting": waiting,
        "queued": ready.get("num_queued"),
        "answers": dict(statuses),
        "before_mb": before.private_mb,
        "grown_mb": highest.private_mb - before.private_mb,
        "health": is_well,
        "idle_after_s": time.monotonic() - gone_s,
    }


async def _ready(server: Server) -> dict[str, Any]:
    """Empty where it is not."""
    answer = await server.http.get("/ready")
    return dict(answer.json()) if answer.is_success else {}


async def measure(
    *,
    workers: int,
    silent: int,
    slow_heads: int,
    slow_bodies: int,
    seconds: float,
    waiting: int,
    body_kb: int,
    max_waiting_mb: int,
) -> tuple[list[Row], list[Check]]:
    counts = {"silent": silent, "slow_heads": slow_heads, "slow_bodies": slow_bodies}
    async with served("--devices", f"cpu:{workers}", "--max-waiting-mb", str(max_waiting_mb)) as server:
        known = await load.draw_undisturbed(server, load.catalogue(4, 1, 2, ((128, 128),)))
        crowds = await beside_crowds(server.address, counts, seconds)
        memory = await memory_of_waiting(server, waiting, body_kb << 10, SETTLE_S)
        again = [await load.ask_for(server, picture) for picture in known]
    opened = [crowd for crowd in (crowds[kind] for kind in counts) if crowd["opened"]]
    left = sum(crowd["opened"] - crowd["refused"] - crowd["closed"] for crowd in opened)
    bound_mb = max_waiting_mb + waiting * KB_EACH / 1024
    rows: list[Row] = [
        {"phase": "silent and slow", **crowds},
        {"phase": "waiting bodies", "max_waiting_mb": max_waiting_mb, **memory},
        {"phase": "after", "right": again.count("right"), "of": len(again)},
    ]
    checks = [
        none_of("probes of /health that failed", len(crowds["failed"])),
        at_most("/health p99", crowds["p99_ms"], MOST_P99_MS, " ms"),
        Check(name="connections still open", figure=left, bound=f"0 after {seconds:g} s", holds=left == 0),
        at_most(f"waiting bodies: --max-waiting-mb + {KB_EACH} KiB each", memory["grown_mb"], bound_mb, " MB"),
        none_of("pictures afterwards that are not right", len(again) - again.count("right")),
        none_of("tracebacks in the server's log", server.num_tracebacks),
    ]
    return rows, checks


def command(command_line: str, output: Path, **options: Any) -> int:
    raise_descriptor_limit()
    rows, checks = asyncio.run(measure(**options))
    return finish(command_line, rows, checks, output)


def raise_descriptor_limit() -> None:
    """Of this process, its crowd and its server: as many as the system allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
