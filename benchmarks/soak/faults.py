"""Faults that come to workers at random while a load runs. Each goes on until it is
cancelled; `events` is what it did."""

import asyncio
import math
import random
import signal
import time
from typing import Any

from benchmarks.soak.server import Server

Event = dict[str, Any]
JITTER = 0.2


def around(every_s: float, rng: random.Random) -> float:
    return every_s * rng.uniform(1 - JITTER, 1 + JITTER)


async def kill_workers(server: Server, every_s: float, rng: random.Random, events: list[Event]) -> None:
    """SIGKILL any worker about every `every_s`, also one that has just come back."""
    begun_s = time.monotonic()
    while True:
        await asyncio.sleep(around(every_s, rng))
        workers = await asyncio.to_thread(server.family.workers)
        if workers and server.family.signal(rng.choice(workers), signal.SIGKILL):
            events.append({"at_s": round(time.monotonic() - begun_s, 2), "kill": True, "of": len(workers)})


async def stop_a_worker(server: Server, stopped_s: float, rng: random.Random, events: list[Event]) -> None:
    """SIGSTOP any worker, SIGCONT after `stopped_s`, if the engine has not killed it by then. Cancelled, it is
    continued at once: a stopped process outlives its server."""
    workers = await asyncio.to_thread(server.family.workers)
    if not workers:
        return
    worker = rng.choice(workers)
    if server.family.signal(worker, signal.SIGSTOP):
        event: Event = {"stopped_s": round(stopped_s, 3), "of": len(workers)}
        events.append(event)
        try:
            await asyncio.sleep(stopped_s)
        finally:
            event["woke"] = server.family.signal(worker, signal.SIGCONT)


async def stop_workers(
    server: Server,
    shortest_s: float,
    longest_s: float,
    every_s: float,
    rng: random.Random,
    events: list[Event],
) -> None:
    """About every `every_s` a stop, with a length between the two, as likely in each octave."""
    while True:
        await asyncio.sleep(around(every_s, rng))
        stopped_s = math.exp(rng.uniform(math.log(shortest_s), math.log(longest_s)))
        await stop_a_worker(server, stopped_s, rng, events)
