"""The real engine with real workers: right, exact at every degree, and never silent."""

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from tetrion.engine.api import AsyncEngine
from tetrion.engine.config import EngineConfig, PlannerConfig
from tetrion.engine.errors import GenerationError, RequestCancelled, RequestError
from tetrion.engine.model_spec import CheckpointError
from tetrion.engine.request import ImageRequest, ImageResult, Progress
from tetrion.engine.sync_engine import Engine

pytestmark = pytest.mark.usefixtures("fork_server")


def small(seed: int, **fields: object) -> ImageRequest:
    return ImageRequest(**({"prompt": "a red circle", "width": 128, "height": 128, "seed": seed} | fields))  # type: ignore[arg-type]


def digest(result: ImageResult) -> str:
    return hashlib.sha256(result.image.tobytes()).hexdigest()


@pytest.mark.asyncio(loop_scope="session")
async def test_a_request_brings_a_picture_and_its_receipt(engine: AsyncEngine) -> None:
    result = await engine.generate(small(7, num_steps=5, slo_ms=600_000.0))
    assert result.image.shape == (128, 128, 3) and result.image.dtype == np.uint8
    assert len(result.degrees) == 5 and result.seed == 7 and result.slo_met is True
    assert result.num_text_tokens >= 3
    assert result.latency_s >= result.encode_s + result.decode_s > 0


@pytest.mark.asyncio(loop_scope="session")
async def test_progress_counts_every_step_and_ends(engine: AsyncEngine) -> None:
    handle = engine.submit(small(1, num_steps=6))
    updates: list[Progress] = [update async for update in handle]
    await handle.result()
    assert updates[-1].state == "finished" and updates[-1].step_index == 6
    assert [u.step_index for u in updates] == sorted(u.step_index for u in updates)


@pytest.mark.asyncio(loop_scope="session")
async def test_same_seed_same_picture_at_every_degree(engine: AsyncEngine) -> None:
    schedules: list[tuple[int, ...]] = [(1,), (2,), (3,), (4,), (1, 2, 3, 4), (4, 1, 3, 2, 2, 4)]
    handles = [engine.submit(small(3, num_steps=6, force_degrees=degrees)) for degrees in schedules]
    results = [await handle.result() for handle in handles]
    assert [result.degrees for result in results[:4]] == [(n,) * 6 for n in (1, 2, 3, 4)]
    assert results[4].degrees == (1, 2, 3, 4, 4, 4) and results[5].degrees == schedules[5]
    assert len({digest(result) for result in results}) == 1


@pytest.mark.asyncio(loop_scope="session")
async def test_contention_uses_several_degrees_and_changes_no_picture(engine: AsyncEngine) -> None:
    requests = [small(seed, width=256, height=256, num_steps=12) for seed in range(5)]
    handles = []
    for request in requests:
        handles.append(engine.submit(request))
        await asyncio.sleep(0.3)
    crowd = [await handle.result() for handle in handles]
    assert len({degree for result in crowd for degree in result.degrees}) >= 2
    async with AsyncEngine(EngineConfig(devices="cpu:1", num_threads=2)) as alone:
        for request, result in zip(requests[:1], crowd, strict=False):
            assert digest(await alone.generate(request)) == digest(result)


@pytest.mark.asyncio(loop_scope="session")
async def test_cancelling_ends_a_request_and_frees_its_slot(engine: AsyncEngine) -> None:
    handle = engine.submit(small(1, width=512, height=512, num_steps=200))
    await asyncio.sleep(0.2)
    handle.cancel()
    with pytest.raises(RequestCancelled):
        await handle.result()
    assert engine.stats().num_admitted == 0
    task = asyncio.create_task(engine.generate(small(2, width=512, height=512, num_steps=200)))
    await asyncio.sleep(0.2)
    task.cancel()
    while engine.stats().num_admitted:
        await asyncio.sleep(0.05)


@pytest.mark.asyncio(loop_scope="session")
async def test_bad_requests_are_refused_at_once(engine: AsyncEngine) -> None:
    for request, field in ((small(1, width=100), "width"), (small(-1), "seed"), (small(1, prompt=""), "prompt")):
        with pytest.raises(RequestError) as caught:
            engine.submit(request)
        assert caught.value.field == field
    with pytest.raises(CheckpointError, match="no-such-model"):
        AsyncEngine(EngineConfig(models=("no-such-model",)))
    with pytest.raises(ValueError, match="policy"):
        AsyncEngine(EngineConfig(planner=PlannerConfig(policy="none")))


@pytest.mark.asyncio(loop_scope="session")
async def test_weights_are_resident_once(engine: AsyncEngine) -> None:
    """Every worker maps all weights, but each page counts once among them (proportional set size)."""
    weights = engine.stats().weights_bytes
    shared = []
    for pid in engine.worker_pids().values():
        entry = [m for m in psutil.Process(pid).memory_maps(grouped=False) if "tetrion-weights" in m.path]
        shared.append((sum(m.rss for m in entry), sum(m.pss for m in entry)))
    assert all(rss > 0.5 * weights for rss, _ in shared)
    assert sum(pss for _, pss in shared) < 1.1 * weights


@pytest.mark.asyncio(loop_scope="session")
async def test_an_engine_s_process_imports_no_torch_and_nothing_outlives_it_when_it_is_killed() -> None:
    """SIGKILL while it draws: its workers go, and with them all shared memory."""
    code = """
        import asyncio, sys
        from tetrion.engine import AsyncEngine, EngineConfig, ImageRequest
        async def main():
            async with AsyncEngine(EngineConfig(devices="cpu:2", num_threads=1)) as engine:
                await engine.generate(ImageRequest(prompt="a star", width=128, height=128, num_steps=1))
                print(*(name for name in ("torch", "transformers", "diffusers") if name in sys.modules), flush=True)
                long = ImageRequest(prompt="a star", width=512, height=512, num_steps=1000)
                async for progress in engine.submit(long):
                    if progress.step_index:
                        print(*engine.worker_pids().values(), flush=True)
        asyncio.run(main())
    """
    before = set(os.listdir("/dev/shm"))
    process = subprocess.Popen([sys.executable, "-P", "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert await asyncio.to_thread(process.stdout.readline) == "\n"
    pids = [int(pid) for pid in (await asyncio.to_thread(process.stdout.readline)).split()]
    assert len(pids) == 2 and all(psutil.pid_exists(pid) for pid in pids)
    process.kill()
    process.wait()
    give_up_s = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < give_up_s:
        await asyncio.sleep(0.05)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert set(os.listdir("/dev/shm")) <= before


@pytest.mark.asyncio(loop_scope="session")
async def test_closing_gives_everything_back() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    engine = AsyncEngine(EngineConfig(devices="cpu:2", num_threads=1))
    await engine.start()
    pids = list(engine.worker_pids().values())
    pending = engine.submit(small(1, width=512, height=512, num_steps=500))
    await asyncio.sleep(0.1)
    await engine.close()
    with pytest.raises(GenerationError, match="stopped"):
        await pending.result()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert descriptors() == before


def test_the_synchronous_engine(tmp_path: Path) -> None:
    with Engine(EngineConfig(devices="cpu:1", num_threads=1)) as engine:
        first = engine.add_request(small(1, num_steps=2))
        second = engine.add_request(small(2, num_steps=2))
        ended = []
        while engine.has_unfinished_requests():
            ended += engine.step()
        assert {output.request_id for output in ended} == {first, second}
        results = engine.generate([small(1, num_steps=2), small(2, num_steps=2)])
        assert [result.seed for result in results] == [1, 2]
        with pytest.raises(RequestError):
            engine.generate([small(3, num_steps=2), small(1, height=1)])
        assert not engine.has_unfinished_requests(), "all of them are drawn or none"
        other = engine.add_request(small(4, num_steps=2))
        assert [result.seed for result in engine.generate([small(5, num_steps=2)])] == [5]
        ended = []
        while engine.has_unfinished_requests():
            ended += engine.step()
        assert [output.request_id for output in ended] == [other], "generate leaves others' results to step"


@pytest.mark.asyncio(loop_scope="session")
async def test_an_engine_whose_loop_dies_says_so_from_then_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with AsyncEngine(EngineConfig(devices="cpu:1", num_threads=1)) as engine:
        assert engine.stats().num_alive == 1
        monkeypatch.setattr("tetrion.engine.loop.loop.EngineLoop.admit", lambda _: {}["injected"])
        pending = engine.submit(small(1))
        with pytest.raises(GenerationError, match=r"the engine loop ended: KeyError\('injected'\)"):
            await pending.result()
        death = await engine.ended()
        assert isinstance(death, GenerationError)
        for ask in (engine.stats, lambda: engine.submit(small(2))):
            with pytest.raises(GenerationError, match="the engine loop ended: KeyError"):
                ask()
        assert any(record.exc_info for record in caplog.records if "loop ended" in record.message)


@pytest.mark.asyncio(loop_scope="session")
async def test_more_workers_than_memory_are_refused_before_any_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tetrion.engine.executors.processes.available_memory_bytes", lambda: 10**9)
    engine = AsyncEngine(EngineConfig(devices="cpu:3"))
    with pytest.raises(GenerationError, match="3 workers take about 1,200,000,000 bytes"):
        await engine.start()
    assert engine.worker_pids() == {}


@pytest.mark.asyncio(loop_scope="session")
async def test_workers_with_interpreters_of_their_own_draw_the_same(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As GPU workers have. One that dies is replaced by the process that stands by with its libraries loaded."""
    monkeypatch.setattr("tetrion.engine.executors.fleet.launch.can_fork", lambda: False)
    async with AsyncEngine(EngineConfig(devices="cpu:1", num_threads=1)) as other:
        (pid,) = other.worker_pids().values()
        children = {child.pid for child in psutil.Process().children()}
        picture = digest(await other.generate(small(3, num_steps=2)))
        os.kill(pid, signal.SIGKILL)
        again = digest(await other.generate(small(3, num_steps=2)))
        (successor,) = other.worker_pids().values()
        assert pid in children and successor in children and successor != pid
    assert not {pid, successor} & set(psutil.pids())
    assert not any("tetrion.engine.worker.spare" in child.cmdline() for child in psutil.Process().children())
    assert picture == again == digest(await engine.generate(small(3, num_steps=2)))
