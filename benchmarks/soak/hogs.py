"""Somebody else's requests that would take hours hold every slot: when is a small picture drawn?

Seven bodies of n 10, 512², 1,000 steps from one tenant (an API key); then, one after the other, small pictures of
another, without and with a deadline.
"""

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import httpx

from benchmarks.soak import load
from benchmarks.soak.report import Check, Row, at_most, finish, none_of
from benchmarks.soak.server import Server, served

HOG: load.Body = {"prompt": "a large red star", "n": 10, "size": "512x512", "num_inference_steps": 1000}
SMALL = ((128, 128),)
SLO_MS = 3000
MOST_S = 2.0
SETTLE_S = 2.0
KEYS = {"hogs": "a-key-of-hogs", "small": "a-key-of-small-ones"}


def with_key(tenant: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[tenant]}"}


async def ask_often(server: Server, pictures: Sequence[load.Picture], timeout_s: float, **more: float) -> Row:
    """One after the other; one that is not answered in time is not asked for any longer. `more`: of the bodies."""
    outcomes, times_s = [], []
    for picture in pictures:
        begun_s = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                outcomes.append(await load.ask_for(server, picture, **more))
        except TimeoutError:
            outcomes.append("no answer")
        times_s.append(time.monotonic() - begun_s)
        if outcomes[-1] == "no answer":
            break
    return {
        "asked": len(outcomes),
        "right": outcomes.count("right"),
        "outcomes": sorted(set(outcomes)),
        "p50_s": load.quantile(times_s, 0.5),
        "max_s": max(times_s),
    }


async def measure(*, workers: int, hogs: int, pictures: int, timeout_s: float) -> tuple[list[Row], list[Check]]:
    keys = [part for tenant, key in KEYS.items() for part in ("--api-key", f"{tenant}:{key}")]
    async with (
        served("--devices", f"cpu:{workers}", *keys, headers=with_key("small")) as server,
        AsyncExitStack() as stack,
    ):
        known = await load.draw_undisturbed(server, load.catalogue(pictures, 1, 4, SMALL))
        calm = await ask_often(server, known, timeout_s)
        client = await stack.enter_async_context(
            httpx.AsyncClient(base_url=server.url, headers=with_key("hogs"), timeout=None)
        )
        asking = [asyncio.create_task(client.post(load.GENERATIONS, json=HOG)) for _ in range(hogs)]
        await asyncio.sleep(SETTLE_S)
        plain = await ask_often(server, known, timeout_s)
        urgent = await ask_often(server, known, timeout_s, slo_ms=SLO_MS)
        hungry = sum(not task.done() for task in asking)
        refused = [task.result().status_code for task in asking if task.done() and not task.exception()]
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    rows: list[Row] = [
        {"phase": "without hogs", **calm},
        {"phase": "plain", **plain},
        {"phase": "with a deadline", "slo_ms": SLO_MS, **urgent},
        {"phase": "hogs", "sent": hogs, "still_waiting": hungry, "answered": refused},
    ]
    both = [plain, urgent]
    checks = [
        none_of("wrong", sum("wrong" in row["outcomes"] for row in both)),
        none_of("not drawn", sum(pictures - row["right"] for row in both)),
        at_most("slowest small picture", max(row["max_s"] for row in both), MOST_S, " s"),
        none_of("tracebacks in the server's log", server.num_tracebacks),
    ]
    return rows, checks


def command(command_line: str, output: Path, **options: float) -> int:
    rows, checks = asyncio.run(measure(**options))  # type: ignore[arg-type]
    return finish(command_line, rows, checks, output)
