"""Real workers that are killed: no request is lost, no picture differs, and the worker comes back."""

import asyncio
import contextlib
import hashlib
import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator

import psutil
import pytest
import pytest_asyncio

from tetrion.engine.api import AsyncEngine
from tetrion.engine.config import EngineConfig
from tetrion.engine.request import GenerationError, ImageRequest, ImageResult

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.usefixtures("fork_server")]
PATIENCE_S = 150.0


def small(**fields: object) -> ImageRequest:
    defaults: dict[str, object] = {"prompt": "a red circle", "width": 128, "height": 128, "seed": 5, "num_steps": 8}
    return ImageRequest(**(defaults | fields))  # type: ignore[arg-type]


def digest(result: ImageResult) -> str:
    return hashlib.sha256(result.image.tobytes()).hexdigest()


def worker_processes() -> set[int]:
    """All processes that were forked from a fork server of this process."""
    pids = set()
    for server in psutil.Process().children():
        with contextlib.suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
            if "tetrion.engine.worker.fork_server" in server.cmdline():
                pids |= {worker.pid for worker in server.children()}
    return pids


def held() -> Counter[str]:
    """What every descriptor of this process refers to, pipes and eventfds by kind."""
    names = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{fd}").split(":[")[0])
        except FileNotFoundError:
            continue  # the listing's own
    return Counter(names)


async def all_alive(engine: AsyncEngine, other_than: dict[int, int]) -> None:
    """Wait until every worker serves, each one of `other_than` as another process."""
    async with asyncio.timeout(PATIENCE_S):
        while any(engine.worker_pids().get(d, pid) == pid for d, pid in other_than.items()):
            await asyncio.sleep(0.05)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pair(fork_server: None) -> AsyncIterator[AsyncEngine]:
    """Shared: each of its workers may be killed three times in all (engine/respawn.py)."""
    async with AsyncEngine(EngineConfig(devices="cpu:2", num_threads=1)) as running:
        yield running


async def draw(engine: AsyncEngine, **fields: object) -> ImageResult:
    return await asyncio.wait_for(engine.generate(small(**fields)), PATIENCE_S)


async def test_a_worker_killed_within_a_step_is_replaced_and_meets_the_other_again(pair: AsyncEngine) -> None:
    reference = await draw(pair, force_degrees=(2,))
    pids, mine, held_before = pair.worker_pids(), worker_processes(), held()
    handles = [pair.submit(small(num_steps=8, force_degrees=(n,))) for n in (2, 1, 2)]
    handles.append(pair.submit(small()))
    await asyncio.sleep(0.1)
    os.kill(pids[1], signal.SIGKILL)
    results = [await asyncio.wait_for(handle.result(), PATIENCE_S) for handle in handles]
    assert {digest(result) for result in results} == {digest(reference)}
    await all_alive(pair, {1: pids[1]})
    again = await draw(pair, force_degrees=(2,))
    assert again.degrees == (2,) * 8 and digest(again) == digest(reference)
    assert pair.worker_pids()[0] == pids[0]
    assert len(worker_processes()) == len(mine) and held() == held_before


async def test_an_idle_worker_that_dies_has_no_part_in_later_barriers(pair: AsyncEngine) -> None:
    """The survivor has counted barriers with it; nothing runs that would notice."""
    reference = await draw(pair, force_degrees=(2,))
    pids = pair.worker_pids()
    os.kill(pids[1], signal.SIGKILL)
    await all_alive(pair, {1: pids[1]})
    again = await draw(pair, force_degrees=(2,))
    assert again.degrees == reference.degrees and digest(again) == digest(reference)


async def test_a_worker_killed_while_it_starts_is_started_once_more(pair: AsyncEngine) -> None:
    pids, others = pair.worker_pids(), worker_processes()
    os.kill(pids[0], signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_S):
        while not (starting := worker_processes() - others):
            await asyncio.sleep(0.02)
    os.kill(starting.pop(), signal.SIGKILL)
    assert (await draw(pair)).degrees == (1,) * 8, "the other goes on"
    await all_alive(pair, {0: pids[0]})
    assert (await draw(pair, force_degrees=(2,))).degrees == (2,) * 8


async def test_with_all_workers_gone_requests_wait_for_the_next(pair: AsyncEngine) -> None:
    reference, pids = await draw(pair), pair.worker_pids()
    running = pair.submit(small(num_steps=8))
    await asyncio.sleep(0.05)
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    while pair.worker_pids():
        await asyncio.sleep(0.01)
    late = pair.submit(small())
    for handle in (running, late):
        assert digest(await asyncio.wait_for(handle.result(), PATIENCE_S)) == digest(reference)
    await all_alive(pair, pids)


async def test_a_worker_that_cannot_live_is_given_up_and_requests_fail(
    own_fork_server: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    held_before, others = held(), worker_processes()
    async with AsyncEngine(EngineConfig(devices="cpu:1", num_threads=1)) as engine:
        handle = engine.submit(small(width=512, height=512, num_steps=100))
        await asyncio.sleep(0.2)
        monkeypatch.setattr(sys, "executable", "/bin/false")
        os.kill(psutil.Process(engine.worker_pids()[0]).ppid(), signal.SIGKILL)
        os.kill(engine.worker_pids()[0], signal.SIGKILL)
        with pytest.raises(GenerationError, match="no worker is alive"):
            await asyncio.wait_for(handle.result(), PATIENCE_S)
        with pytest.raises(GenerationError, match="no worker is alive"):
            engine.submit(small())
        assert engine.stats().num_alive == 0
    given_up = "worker 0 is given up, it died too often; the last time: no exit status, its fork server"
    assert f"{given_up} exited with status 1" in caplog.text
    assert "worker 0 was lost: no exit status, its fork server killed by signal 9" in caplog.text
    assert held() == held_before and worker_processes() == others


async def test_a_worker_lost_at_the_start_fails_it(own_fork_server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    held_before = held()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    engine = AsyncEngine(EngineConfig(devices="cpu:2"))
    with pytest.raises(GenerationError, match=r"ended while starting: .* its fork server exited with status 1"):
        await engine.start()
    assert held() == held_before


async def test_a_worker_that_does_not_come_up_in_time_fails_the_start(own_fork_server: None) -> None:
    engine = AsyncEngine(EngineConfig(devices="cpu:1", start_timeout_s=0.01))
    with pytest.raises(GenerationError, match=r"not ready within the start timeout of 0\.01 s"):
        await engine.start()
