"""The server under test: `tetrion serve` on CPU workers, with its log, its metrics and its processes."""

import asyncio
import os
import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.serving import Process, server
from benchmarks.soak.processes import MARK, Family

TRACEBACK = "Traceback (most recent call last)"
COUNTERS = ("tetrion_worker", "tetrion_request", "tetrion_http_refusals", "tetrion_http_connections_closed")
"""Beginnings of the names of what a result keeps of /metrics."""
TIMEOUT_S = 120.0
KEEP_ALIVE_S = 0.5
"""Shorter than any server's here: one that closes while a request is on its way would look like a loss."""


class Server:
    """`log`: its lines so far; `http`: a client without limits of its own but `TIMEOUT_S`, after which an answer counts
    as lost. `headers` go with every request."""

    def __init__(self, url: str, process: Process, mark: str, log: list[str], headers: dict[str, str]) -> None:
        self.url, self.log = url, log
        self.process = process
        self.family = Family(process.pid, mark)
        self.http = httpx.AsyncClient(
            base_url=url,
            headers=headers,
            timeout=TIMEOUT_S,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEEP_ALIVE_S),
        )

    @property
    def address(self) -> tuple[str, int]:
        parts = httpx.URL(self.url)
        return parts.host, parts.port or 80

    async def counters(self) -> dict[str, float]:
        """Those of /metrics that tell of faults, by name and labels."""
        text = (await self.http.get("/metrics")).raise_for_status().text
        return {
            name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if (name := _name_of(sample.name, sample.labels)).startswith(COUNTERS)
            and not sample.name.endswith("_created")
        }

    async def num_alive(self) -> int:
        """0 while nobody is."""
        answer = await self.http.get("/ready")
        return int(answer.json()["num_alive"]) if answer.is_success else 0

    async def until_alive(self, num_workers: int, timeout_s: float = 90.0) -> bool:
        """Whether so many workers came back in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while await self.num_alive() < num_workers:  # noqa: ASYNC110 (nobody tells)
                    await asyncio.sleep(0.2)
        except TimeoutError:
            return False
        return True

    @property
    def num_tracebacks(self) -> int:
        return sum(TRACEBACK in line for line in self.log)


@asynccontextmanager
async def served(
    *arguments: str, headers: dict[str, str] | None = None, environment: dict[str, str] | None = None
) -> AsyncIterator[Server]:
    """`environment`: beside this process's own. Raises RuntimeError if it does not start or end as it should."""
    mark, log = secrets.token_hex(8), list[str]()
    opened = server(arguments, environment=os.environ | (environment or {}) | {MARK: mark}, said=log.append)
    try:
        url, process = await asyncio.to_thread(opened.__enter__)
    except RuntimeError:
        sys.stderr.writelines(log[-20:])
        raise
    under_test = Server(url, process, mark, log, headers or {})
    try:
        yield under_test
    except BaseException as error:
        await asyncio.to_thread(opened.__exit__, type(error), error, error.__traceback__)
        raise
    else:
        await asyncio.to_thread(opened.__exit__, None, None, None)
    finally:
        await under_test.http.aclose()


def _name_of(name: str, labels: dict[str, str]) -> str:
    return name + (f"{{{','.join(f'{key}={value}' for key, value in sorted(labels.items()))}}}" if labels else "")


def since(before: dict[str, float], now: dict[str, float]) -> dict[str, float]:
    """What counters have gained."""
    return {name: value - before.get(name, 0.0) for name, value in now.items() if value != before.get(name, 0.0)}
