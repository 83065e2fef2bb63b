"""How a server answers `/health` beside connections that say nothing, or little.

    python -m benchmarks.connections --url http://127.0.0.1:8000 --silent 1500 --slow-heads 300 --slow-bodies 300

Opens them all, asks for `/health` ten times a second on new connections until the server has closed every one of the
others, or `--seconds` have passed, and prints one JSON object. Knows nothing of the engine; any HTTP server will do.
"""

import asyncio
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import click

BODY = b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n\r\n"
HEAD = b"GET /health HTTP/1.1\r\nhost: localhost\r\na: "
PROBE = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
PERIOD_S = 0.1
AT_ONCE = 64


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
    _, pending = await asyncio.wait(held, timeout=seconds)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    return {kind: crowds[kind].figures(count) for kind, count in counts.items()}


def hold_in_process(*arguments: Any) -> dict[str, dict[str, object]]:
    return asyncio.run(hold_all(*arguments))


async def measure(url: str, counts: dict[str, int], seconds: float) -> dict[str, object]:
    """The crowd has a process of its own, so that what it costs its own loop is not taken for the server's time."""
    split = urlsplit(url)
    address = (split.hostname or "127.0.0.1", split.port or 80)
    times_s: list[float] = []
    errors: list[str] = []
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        holding = asyncio.get_running_loop().run_in_executor(pool, hold_in_process, address, counts, seconds)
        probing = asyncio.create_task(probe(address, times_s, errors))
        crowds = await holding
        probing.cancel()
    times_ms = sorted(round(1000 * one, 1) for one in times_s)
    return {
        "probes": len(times_ms),
        "failed": errors[:10],
        "p50_ms": times_ms[len(times_ms) // 2],
        "p99_ms": times_ms[int(len(times_ms) * 0.99)],
        "max_ms": times_ms[-1],
        **crowds,
    }


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True)
@click.option("--silent", type=click.IntRange(min=0), default=1500, show_default=True)
@click.option("--slow-heads", type=click.IntRange(min=0), default=300, show_default=True)
@click.option("--slow-bodies", type=click.IntRange(min=0), default=300, show_default=True)
@click.option("--seconds", type=float, default=90.0, show_default=True)
def main(url: str, silent: int, slow_heads: int, slow_bodies: int, seconds: float) -> None:
    """Measure how a server answers /health beside silent and slow connections."""
    counts = {"silent": silent, "slow_heads": slow_heads, "slow_bodies": slow_bodies}
    click.echo(json.dumps(asyncio.run(measure(url, counts, seconds)), indent=2))


if __name__ == "__main__":
    main()
