"""Real workers that are killed: no request is lost, no picture differs, and the worker comes back."""

import asyncio
import contextlib
import hashlib
import logging
import os
import random
import re
import resource
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator

import psutil
import pytest
import pytest_asyncio

from tetrion.engine.api import AsyncEngine, RequestHandle
from tetrion.engine.config import EngineConfig
from tetrion.engine.errors import GenerationError
from tetrion.engine.executors.fleet import respawn
from tetrion.engine.executors.fleet.forked import ForkedWorker
from tetrion.engine.request import ImageRequest, ImageResult

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.usefixtures("fork_server", "short_pauses")]
PATIENCE_S = 150.0


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are started again after hundredths of a second."""
    for name in ("FIRST_PAUSE_S", "LONGEST_PAUSE_S"):
        monkeypatch.setattr(respawn, name, 0.02)


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


@contextlib.contextmanager
def no_free_descriptor() -> Iterator[None]:
    """Every descriptor that this process may have is taken, also those that a dead worker leaves."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 8, hard))
    taken: list[int] = []

    def take() -> None:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))

    async def keep_taking() -> None:
        while True:
            take()
            await asyncio.sleep(0.002)

    take()
    taking = asyncio.create_task(keep_taking())
    try:
        yield
    finally:
        taking.cancel()
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def progress_of(handle: RequestHandle) -> None:
    """Wait until a step of the request has been carried out."""
    async with asyncio.timeout(PATIENCE_S):
        async for progress in handle:
            if progress.step_index:
                return


async def all_alive(engine: AsyncEngine, other_than: dict[int, int]) -> None:
    """Wait until every worker serves, each one of `other_than` as another process."""
    async with asyncio.timeout(PATIENCE_S):
        while any(engine.worker_pids().get(d, pid) == pid for d, pid in other_than.items()) or not all_serve(engine):
            await asyncio.sleep(0.05)


def all_serve(engine: AsyncEngine) -> bool:
    """Whether every worker is given commands: one that is alive joins the others a moment later."""
    return len(engine.stats().recovery.serving) == engine.stats().num_devices == len(engine.worker_pids())


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pair(fork_server: None) -> AsyncIterator[AsyncEngine]:
    """Shared by tests that each kill a worker or two, which are started again at once."""
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
    await draw(pair)
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


async def test_an_engine_whose_every_worker_is_killed_again_and_again_draws(pair: AsyncEngine) -> None:
    reference, held_before, mine = await draw(pair), held(), worker_processes()
    for _ in range(10):
        pids = pair.worker_pids()
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
        await all_alive(pair, pids)
    assert digest(await draw(pair)) == digest(reference)
    assert digest(await draw(pair, force_degrees=(2,))) == digest(reference)
    assert held() == held_before and len(worker_processes()) == len(mine)


async def test_an_engine_that_has_no_worker_for_too_long_ends(
    own_fork_server: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    held_before, others = held(), worker_processes()
    async with AsyncEngine(EngineConfig(devices="cpu:1", num_threads=1, no_worker_timeout_s=3.0)) as engine:
        handle = engine.submit(small(width=512, height=512, num_steps=100))
        await progress_of(handle)
        monkeypatch.setattr(sys, "executable", "/bin/false")
        os.kill(psutil.Process(engine.worker_pids()[0]).ppid(), signal.SIGKILL)
        os.kill(engine.worker_pids()[0], signal.SIGKILL)
        while engine.worker_pids():
            await asyncio.sleep(0.01)
        waiting = engine.submit(small())
        death = await asyncio.wait_for(engine.ended(), PATIENCE_S)
        assert re.match(r"no worker has been alive for 3 s; the last one lost, worker 0: no exit status", str(death))
        for each in (handle, waiting):
            with pytest.raises(GenerationError, match="no worker has been alive for 3 s"):
                await asyncio.wait_for(each.result(), PATIENCE_S)
        with pytest.raises(GenerationError, match="no worker has been alive for 3 s"):
            engine.submit(small())
    again = r"worker 0 is started again in 0\.02 s; the reason: no exit status, its fork server "
    assert re.search(again + "exited with status 1", caplog.text)
    assert "worker 0 was lost: no exit status, its fork server killed by signal 9" in caplog.text
    assert not any(record.exc_info for record in caplog.records)
    assert held() == held_before and worker_processes() == others


async def test_a_death_when_no_descriptor_is_free_is_reported_at_once(pair: AsyncEngine) -> None:
    reference, pids, held_before = await draw(pair), pair.worker_pids(), held()
    handle = pair.submit(small(width=256, height=256, num_steps=30, force_degrees=(2,)))
    await progress_of(handle)
    with no_free_descriptor():
        os.kill(pids[1], signal.SIGKILL)
        while len(pair.worker_pids()) > 1:
            await asyncio.sleep(0.01)
        assert digest(await draw(pair)) == digest(reference), "the other goes on, descriptors or not"
        assert list(pair.worker_pids()) == [0]
    async with asyncio.timeout(PATIENCE_S):
        await handle.result()
        await all_alive(pair, {1: pids[1]})
    assert (await draw(pair, force_degrees=(2,))).degrees == (2,) * 8
    assert held() == held_before


async def test_with_all_workers_and_all_descriptors_gone_requests_are_answered_when_there_are_descriptors_again(
    pair: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    reference, pids, held_before = await draw(pair), pair.worker_pids(), held()
    handles = [pair.submit(small(num_steps=8)) for _ in range(3)]
    await progress_of(handles[0])
    with no_free_descriptor():
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
        while pair.worker_pids():
            await asyncio.sleep(0.01)
        handles.append(pair.submit(small()))
        while caplog.text.count("the reason: it cannot be started: [Errno 24] Too many open files") < 5:
            await asyncio.sleep(0.01)
        assert not pair.worker_pids()
    async with asyncio.timeout(PATIENCE_S):
        results = [await handle.result() for handle in handles]
    assert {digest(result) for result in results} == {digest(reference)}
    await all_alive(pair, pids)
    assert held() == held_before


async def test_descriptors_that_run_out_while_a_worker_starts_do_not_keep_it_from_coming_up(pair: AsyncEngine) -> None:
    """Nor from being killed afterwards: it has no pidfd."""
    pids, others, held_before = pair.worker_pids(), worker_processes(), held()
    os.kill(pids[0], signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_S):
        while not worker_processes() - others:
            await asyncio.sleep(0.001)
    with no_free_descriptor():
        await all_alive(pair, {0: pids[0]})
        os.kill(pair.worker_pids()[0], signal.SIGKILL)
        while len(pair.worker_pids()) > 1:
            await asyncio.sleep(0.01)
        await draw(pair)
    async with asyncio.timeout(PATIENCE_S):
        await all_alive(pair, pids | {1: 0})
    assert (await draw(pair, force_degrees=(2,))).degrees == (2,) * 8
    assert held() == held_before


async def test_a_burial_that_fails_is_still_a_loss(pair: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: ForkedWorker) -> str:
        raise IndexError("list index out of range")

    reference, pids = await draw(pair), pair.worker_pids()
    handle = pair.submit(small(num_steps=8, force_degrees=(2,)))
    with monkeypatch.context() as patch:
        patch.setattr(ForkedWorker, "how_it_ended", broken)
        os.kill(pids[1], signal.SIGKILL)
        assert digest(await asyncio.wait_for(handle.result(), PATIENCE_S)) == digest(reference)
    await all_alive(pair, {1: pids[1]})


async def test_a_stopped_worker_of_a_group_whose_other_member_dies_is_killed_and_the_request_goes_on(
    pair: AsyncEngine,
) -> None:
    """It does not even react to being aborted."""
    reference, pids = await draw(pair), pair.worker_pids()
    handle = pair.submit(small(num_steps=200, force_degrees=(2,)))
    alone = digest(await draw(pair, num_steps=200))
    await progress_of(handle)
    os.kill(pids[0], signal.SIGSTOP)
    os.kill(pids[1], signal.SIGKILL)
    late = pair.submit(small())
    assert digest(await asyncio.wait_for(handle.result(), PATIENCE_S)) == alone
    assert digest(await asyncio.wait_for(late.result(), PATIENCE_S)) == digest(reference)
    await all_alive(pair, pids)
    assert (await draw(pair, force_degrees=(2,))).degrees == (2,) * 8


async def test_workers_that_are_stopped_and_go_on_at_random_moments_change_no_bit(pair: AsyncEngine) -> None:
    """For too short to be noticed, for long enough to be set aside or killed; alone and in groups."""
    draws, loop = random.Random(8), asyncio.get_running_loop()
    reference = digest(await draw(pair))
    for for_s in (0.01, 0.1, 3.0, 0.3, 3.0, 3.0):
        handles = [pair.submit(small(force_degrees=degrees)) for degrees in ((1,), (2,), (1, 2, 1, 2), ())]
        await progress_of(handles[0])
        await asyncio.sleep(draws.uniform(0, 0.3))
        pid = draws.choice(list(pair.worker_pids().values()))
        os.kill(pid, signal.SIGSTOP)
        loop.call_later(for_s, go_on, pid)
        results = await asyncio.wait_for(asyncio.gather(*[handle.result() for handle in handles]), PATIENCE_S)
        assert {digest(result) for result in results} == {reference}
        async with asyncio.timeout(PATIENCE_S):
            while not all_serve(pair) or pair.stats().recovery.overdue:
                await asyncio.sleep(0.01)


def go_on(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


async def test_a_loss_repeats_the_chunk_that_was_cut_off(pair: AsyncEngine) -> None:
    """At step 30 of 40, whether another worker has the state or nobody."""
    for degree in (1, 2):
        wish = {"num_steps": 40, "width": 256, "height": 256, "force_degrees": (degree,)}
        reference, before = digest(await draw(pair, **wish)), pair.stats().recovery.num_repeated_steps
        handle = pair.submit(small(**wish))
        async for progress in handle:
            if progress.step_index >= 30:
                break
        os.kill(pair.worker_pids()[pair._loop.table.get(handle.request_id).holders[0]], signal.SIGKILL)
        assert digest(await asyncio.wait_for(handle.result(), PATIENCE_S)) == reference
        assert pair.stats().recovery.num_repeated_steps - before <= 10
        async with asyncio.timeout(PATIENCE_S):
            while not all_serve(pair):
                await asyncio.sleep(0.01)


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
