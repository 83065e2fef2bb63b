"""Traces on a real engine, embedded in this process, or on a server over HTTP.

Requests are submitted at their times on the wall clock whatever has become of those before (open loop). Latency is
counted from the time in the trace, so a load generator that falls behind makes figures worse, never better.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Self

import msgspec

from tetrion.engine.api import AsyncEngine
from tetrion.engine.config import EnergyMode, EngineConfig
from tetrion.engine.errors import EngineOverloaded, GenerationError, RequestCancelled, RequestError
from tetrion.engine.hardware.event_loop import new_event_loop
from tetrion.engine.loop.statistics import LoopFigures
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.planning.cost.profile import Profile
from tetrion.engine.planning.cost.tables import CostTables, only_table
from tetrion.engine.planning.policies.registry import get_planner
from tetrion.engine.request import EnergyOptions, ImageRequest, Receipt
from tetrion.engine.resolve import resolve_request
from tetrion.entrypoints.bench.image_client import ImageClient, import_httpx
from tetrion.entrypoints.bench.ledger import ledger_facts
from tetrion.entrypoints.bench.outcomes import Chunk, Mode, Outcome, Run
from tetrion.entrypoints.bench.recording import Recorder
from tetrion.entrypoints.bench.simulation import as_image_request, prompt_of
from tetrion.entrypoints.bench.workloads import Size, Trace, TraceRequest
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.options import only_model
from tetrion.entrypoints.session import freeze_gc, open_engine

HEAD_START_S = 0.1
"""From the start of a run to time 0 of its trace."""
LAST_SLEEP_S = 0.25
"""Linux may end a wait late by 0.1 % of its length, at most by 0.1 s (fs/select.c): this one by 0.25 ms."""
WARM_STEPS = 4
Answer = tuple[int, ...] | None
"""The degrees of a finished request's steps, None if it failed."""


def joules_of(active_j: float | None, idle_share_j: float | None) -> float | None:
    """What a receipt says that a picture cost in all; None if it does not know."""
    return None if active_j is None or idle_share_j is None else active_j + idle_share_j


class EmbeddedSystem:
    """An engine in this process. A context manager. One start serves all policies: the recorder exchanges the policy
    while nothing runs, so that all of them meet the same workers, weights and (ever better corrected) cost table."""

    mode: Mode = "live"

    def __init__(self, config: EngineConfig) -> None:
        """Raises InputError for what is wrong with `config`; starts nothing."""
        only_model(config)
        self.recorder = Recorder()
        self._engine = open_engine(config, lambda config: AsyncEngine(config, instrument=self.recorder))
        self._runner = asyncio.Runner(loop_factory=new_event_loop)
        self._run_number = 0
        self.energy_mode: EnergyMode | None = None
        """That requests ask for from now on; None: the server's."""
        self.receipts: dict[int, Receipt] = {}
        """Of the latest run's pictures, by their place in the trace, in the order in which they were finished."""

    def __enter__(self) -> Self:
        try:
            self._runner.run(self._engine.start())
        except BaseException:
            self._runner.close()
            raise
        freeze_gc()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._runner.run(self._engine.close())
        finally:
            self._runner.close()

    @property
    def num_devices(self) -> int:
        return len(self._engine.devices)

    @property
    def profile(self) -> Profile:
        """The cost table as corrected so far."""
        return self._engine.stats().profiles[self._engine.spec.name]

    @property
    def tables(self) -> CostTables:
        return only_table(self.profile)

    @property
    def facts(self) -> dict[str, Any]:
        """What a recording says of the engine."""
        config = self._engine.config
        return {
            "model": self._engine.spec.name,
            "devices": [device.name for device in self._engine.devices],
            "max_inflight": config.max_inflight,
        }

    @property
    def ledger(self) -> dict[str, Any]:
        """What the energy account adds up to so far."""
        return ledger_facts(self._engine.stats())

    def check(self, trace: Trace) -> None:
        """Raises InputError for a request that the model does not draw."""
        check_trace(trace, self._engine.spec, self.num_devices)

    def warm_up(self, sizes: Sequence[Size]) -> None:
        """Every size at every degree on every device: what is made on first use is made, and the cost table has seen
        it."""
        self._runner.run(self._warm_up(sizes))

    async def _warm_up(self, sizes: Sequence[Size]) -> None:
        """As many requests at once as there are devices, so that each is encoded on another one, which then leads a
        group; two in turn where there is one device."""
        for size in sizes:
            for degree in self._engine.spec.legal_degrees(self.num_devices):
                for _ in range(1 if self.num_devices > 1 else 2):
                    requests = [_warm_up_request(size, degree, number) for number in range(self.num_devices)]
                    await asyncio.gather(*map(self._engine.generate, requests))

    def run(self, trace: Trace, policy: str, seed: int) -> tuple[Run, tuple[Chunk, ...]]:
        """One trace under one policy (`seed`: of no use here)."""
        return self._runner.run(self._run(trace, policy))

    async def _run(self, trace: Trace, policy: str) -> tuple[Run, tuple[Chunk, ...]]:
        self.recorder.planner = get_planner(policy)
        before, zero_s = self._engine.stats().loop, time.monotonic() + HEAD_START_S
        self.recorder.start(zero_s)
        self.receipts = {}
        self._refused: set[int] = set()
        self._run_number += 1
        finished, max_lag_s = await open_loop(trace, zero_s, self._draw)
        run = self.recorder.run(
            trace,
            finished,
            num_devices=self.num_devices,
            end_s=time.monotonic() - zero_s,
            max_lag_s=max_lag_s,
            loop=since(before, self._engine.stats().loop),
            refused=self._refused,
        )
        joules = tuple(joules_of(receipt.active_j, receipt.idle_share_j) for receipt in self.receipts.values())
        return msgspec.structs.replace(run, joules=joules), tuple(self.recorder.chunks)

    async def _draw(self, request: TraceRequest, number: int) -> Answer:
        wanted = as_image_request(request, number, self._run_number)
        if self.energy_mode is not None:
            wanted = msgspec.structs.replace(wanted, energy=EnergyOptions(mode=self.energy_mode))
        try:
            result = await self._engine.generate(wanted)
        except EngineOverloaded:
            self._refused.add(number)
            return None
        except (GenerationError, RequestCancelled):
            return None
        self.receipts[number] = result.energy
        return result.degrees


def check_trace(trace: Trace, spec: ModelSpec, num_devices: int) -> None:
    """Raises InputError for a request that the model does not draw."""
    for number, request in enumerate(trace):
        try:
            resolve_request(as_image_request(request, number), spec, num_devices)
        except RequestError as error:
            raise InputError(f"trace: request {number + 1}: {error}") from None


def _warm_up_request(size: Size, degree: int, number: int) -> ImageRequest:
    return ImageRequest(
        prompt=f"warm up {number}",
        width=size[0],
        height=size[1],
        num_steps=WARM_STEPS,
        seed=0,
        force_degrees=(degree,),
        request_id=f"warm-up-{number}",
    )


def since(before: LoopFigures, now: LoopFigures) -> LoopFigures:
    """What the loop cost between two moments."""
    start, end = msgspec.structs.asdict(before), msgspec.structs.asdict(now)
    return LoopFigures(**{name: end[name] - start[name] for name in end})


class HttpSystem:
    """A server somewhere else, under the policy it was started with; needs httpx. Latencies are the client's: those of
    the network and of encoding the picture are inside. The server says nothing of GPU time and decisions."""

    mode: Mode = "live"

    def __init__(self, url: str) -> None:
        """Asks the server what it is. Raises InputError if it does not answer."""
        self._httpx = import_httpx()
        self.url = url.rstrip("/")
        self._run_number = 0
        try:
            ready = self._httpx.get(f"{self.url}/ready", timeout=10.0).raise_for_status().json()
        except (self._httpx.HTTPError, self._httpx.InvalidURL, ValueError) as error:
            raise InputError(f"url: {self.url} is not a server that is ready: {error}") from None
        self.num_devices = int(ready["num_devices"])
        not_sent = "weights and tenants of the trace: the API takes none, and knows tenants by their keys"
        self.facts: dict[str, Any] = {
            "model": ", ".join(ready.get("models", ())),
            "url": self.url,
            "not_sent": not_sent,
        }

    def run(self, trace: Trace, policy: str, seed: int) -> tuple[Run, tuple[Chunk, ...]]:
        """One trace (`policy` is the server's own)."""
        return asyncio.run(self._run(trace)), ()

    async def _run(self, trace: Trace) -> Run:
        async with ImageClient(self.url) as client:
            self._joules: list[float | None] = []
            self._refused: set[int] = set()
            self._run_number += 1
            zero_s = time.monotonic() + HEAD_START_S
            finished, max_lag_s = await open_loop(trace, zero_s, lambda r, number: self._draw(client, r, number))
            return Run(
                outcomes=tuple(
                    Outcome(
                        request=request,
                        finished_s=finished_s,
                        gpu_s=None,
                        degrees=degrees,
                        refused=number in self._refused,
                    )
                    for number, (request, (finished_s, degrees)) in enumerate(zip(trace, finished, strict=True))
                ),
                num_devices=self.num_devices,
                end_s=time.monotonic() - zero_s,
                max_lag_s=max_lag_s,
                joules=tuple(self._joules),
            )

    async def _draw(self, client: ImageClient, request: TraceRequest, number: int) -> Answer:
        body = {
            "prompt": prompt_of(number, self._run_number),
            "size": f"{request.width}x{request.height}",
            "num_inference_steps": request.num_steps,
            "seed": number,
            "output_format": "jpeg",
        }
        if request.slo_s is not None:
            body["slo_ms"] = request.slo_s * 1e3
        answer = await client.draw(body)
        if answer.is_refused:
            self._refused.add(number)
        if answer.error is not None:
            return None
        (picture,) = answer.pictures
        receipt = picture.get("energy") or {}
        self._joules.append(joules_of(receipt.get("active_j"), receipt.get("idle_share_j")))
        return tuple(picture["degrees"])


async def open_loop(
    trace: Trace, zero_s: float, draw: Callable[[TraceRequest, int], Awaitable[Answer]]
) -> tuple[list[tuple[float | None, tuple[int, ...]]], float]:
    """Start `draw(request, number)` for every request at its time after `zero_s` (CLOCK_MONOTONIC) and wait for all.

    Returns for each its time of finishing and degrees, (None, ()) if it failed, and the largest lag of a start.
    """
    lags_s = [0.0]

    async def one(request: TraceRequest, number: int) -> tuple[float | None, tuple[int, ...]]:
        await sleep_until(zero_s + request.arrival_s)
        lags_s.append(time.monotonic() - zero_s - request.arrival_s)
        degrees = await draw(request, number)
        return (None, ()) if degrees is None else (time.monotonic() - zero_s, degrees)

    finished = await asyncio.gather(*(one(request, number) for number, request in enumerate(trace)))
    return list(finished), max(lags_s)


async def sleep_until(time_s: float) -> None:
    """`time_s`: on CLOCK_MONOTONIC. The last wait is a short one (`LAST_SLEEP_S`), so that it ends in time."""
    await asyncio.sleep(time_s - LAST_SLEEP_S - time.monotonic())
    await asyncio.sleep(time_s - time.monotonic())
