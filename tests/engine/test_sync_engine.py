"""`Engine` with real workers: from threads, in a running loop, in forked children, closed at odd moments."""

import asyncio
import gc
import multiprocessing
import os
import re
import signal
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tetrion.engine.api import AsyncEngine
from tetrion.engine.config import EngineConfig
from tetrion.engine.errors import EngineOverloaded, GenerationError, RequestCancelled, RequestError
from tetrion.engine.request import Failure, ImageRequest, ImageResult
from tetrion.engine.sync_engine import Engine

pytestmark = pytest.mark.usefixtures("fork_server")
CONFIG = EngineConfig(devices="cpu:1", num_threads=1, max_queued=16)


def request(prompt: str = "a red circle", **fields: Any) -> ImageRequest:
    return ImageRequest(**{"prompt": prompt, "width": 128, "height": 128, "num_steps": 1, "seed": 1} | fields)


@pytest.fixture(scope="module")
def engine(fork_server: None) -> Iterator[Engine]:
    with Engine(CONFIG) as running:
        yield running


def worker_pids(engine: Engine) -> list[int]:
    return list(engine._engine.worker_pids().values())


def become_mortal(after_s: int) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(after_s)


def in_child(action: Callable[[], object]) -> str:
    """What a forked child says of `action`: what it raised or returned."""
    read_fd, write_fd = os.pipe()
    if (pid := os.fork()) == 0:
        become_mortal(20)
        try:
            said = repr(action())
        except BaseException as error:
            said = repr(error)
        os.write(write_fd, said.encode())
        os._exit(0)
    os.close(write_fd)
    with open(read_fd) as pipe:
        said = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return said


# What may be given -------------------------------------------------------------------------------------------------


def test_a_single_request_is_one_picture(engine: Engine) -> None:
    for given in (request(), [request()], iter([request()]), (request() for _ in range(1)), {request(): 1}.keys()):
        (result,) = engine.generate(given)
        assert result.prompt == "a red circle"
    assert engine.generate([]) == engine.generate(iter(())) == []


def test_a_text_is_one_prompt(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def refuse(given: object) -> None:
        asked.append(given)
        raise EngineOverloaded("full")

    monkeypatch.setattr(engine._engine, "submit", refuse)
    for text in ("red", np.str_("red")):
        with pytest.raises(EngineOverloaded):
            engine.generate(text)
    assert asked == ["red", "red"]


async def _asynchronous() -> AsyncIterator[str]:
    yield "red"


class Table:
    """As pandas' and polars' tables, which iterate over the names of their columns."""

    columns = ("prompt",)

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)


@pytest.mark.parametrize(
    "given", [None, 7, b"red", {"prompt": "red"}, _asynchronous(), Table(), ImageRequest, object(), np.array("red")]
)
def test_what_is_no_list_of_requests_is_refused_by_name(engine: Engine, given: Any) -> None:
    with pytest.raises(RequestError, match="requests: must be a prompt, an ImageRequest, or a list") as caught:
        engine.generate(given)
    assert ("not asynchronous" in str(caught.value)) is hasattr(given, "__aiter__")


def test_of_a_request_that_is_refused_or_an_iterator_that_fails_the_others_are_given_up(engine: Engine) -> None:
    def failing() -> Iterator[ImageRequest]:
        yield request(num_steps=1000)
        raise KeyError("mine")

    def endless() -> Iterator[ImageRequest]:
        while True:
            yield request(num_steps=1000)

    with pytest.raises(KeyError, match="mine"):
        engine.generate(failing())
    with pytest.raises(RequestError, match="seed"):
        engine.generate([request(num_steps=1000), request(seed=-1)])
    with pytest.raises(EngineOverloaded):
        engine.generate(endless())
    assert len(engine.generate(request())) == 1 and not engine.has_unfinished_requests()


# Loops and threads --------------------------------------------------------------------------------------------------


async def test_within_a_running_loop(engine: Engine) -> None:
    assert [result.seed for result in engine.generate([request(seed=1), request(seed=2)])] == [1, 2]
    first = engine.add_request(request())
    assert [output.request_id for output in engine.step()] == [first] and engine.step() == []
    with Engine(CONFIG) as another:
        assert len(another.generate(request())) == 1


def test_from_several_threads(engine: Engine) -> None:
    with ThreadPoolExecutor(4) as threads:
        several = threads.map(lambda seed: engine.generate([request(seed=seed), request(seed=seed + 10)]), range(4))
        added = threads.map(lambda seed: engine.add_request(request(seed=seed)), range(20, 24))
        assert [[result.seed for result in results] for results in several] == [[i, i + 10] for i in range(4)]
        ids = set(added)

    def drain() -> list[ImageResult | Failure]:
        outputs: list[ImageResult | Failure] = []
        while engine.has_unfinished_requests():
            outputs += engine.step()
        return outputs

    with ThreadPoolExecutor(3) as threads:
        outputs = [output for part in threads.map(lambda _: drain(), range(3)) for output in part]
    assert sorted(output.request_id for output in outputs) == sorted(ids)
    assert all(isinstance(output, ImageResult) for output in outputs)


def test_a_request_is_aborted_from_another_thread(engine: Engine) -> None:
    request_id = engine.add_request(request(num_steps=1000))
    threading.Timer(0.1, engine.abort_request, [request_id]).start()
    (output,) = engine.step()
    assert isinstance(output, Failure) and isinstance(output.error, RequestCancelled)
    engine.abort_request("nobody's")


def test_ctrl_c_gives_the_pictures_up_and_the_engine_goes_on(engine: Engine) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it may be ignored
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.generate([request(num_steps=1000)])
    finally:
        signal.signal(signal.SIGINT, before)
    begun_s = time.monotonic()
    assert len(engine.generate(request())) == 1
    assert time.monotonic() - begun_s < 10


# Ends ---------------------------------------------------------------------------------------------------------------


def test_closed_twice_and_within_with_and_used_afterwards() -> None:
    with Engine(CONFIG) as engine:
        pids = worker_pids(engine)
        engine.close()
        engine.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    for use in (
        lambda: engine.generate("a star"),
        lambda: engine.generate([]),
        lambda: engine.add_request("a star"),
        engine.step,
    ):
        with pytest.raises(GenerationError, match="the engine is closed"):
            use()
    engine.abort_request("x")
    assert not engine.has_unfinished_requests()


def test_closed_while_others_draw() -> None:
    engine, ended = Engine(CONFIG), []

    def draw() -> None:
        try:
            engine.generate([request(num_steps=1000)] * 2)
        except GenerationError as error:
            ended.append(str(error))

    def step() -> None:
        engine.add_request(request(num_steps=1000))
        ended.extend(str(output.error) for output in engine.step() if isinstance(output, Failure))

    threads = [threading.Thread(target=action) for action in (draw, step, draw)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    closers = [threading.Thread(target=engine.close) for _ in range(3)]
    for closer in closers:
        closer.start()
    for thread in (*threads, *closers):
        thread.join(20)
        assert not thread.is_alive()
    assert ended == ["the engine was stopped"] * 3


def test_one_that_is_forgotten_ends() -> None:
    engine = Engine(CONFIG)
    processes = [psutil.Process(pid) for pid in worker_pids(engine)]
    engine.add_request(request(num_steps=1000))
    del engine
    gc.collect()
    assert not psutil.wait_procs(processes, timeout=20)[1]


async def test_an_async_engine_is_started_once_closed_twice_and_not_shared_between_loops() -> None:
    async with AsyncEngine(CONFIG) as engine:
        with pytest.raises(GenerationError, match="started or closed before"):
            await engine.start()

        def elsewhere() -> str:
            async def generate() -> object:
                return await engine.generate(request())

            with pytest.raises(GenerationError, match="another event loop"):
                engine.submit(request())
            with pytest.raises(GenerationError, match="another event loop") as caught:
                asyncio.run(generate())
            return str(caught.value)

        assert "threads can share an Engine" in await asyncio.to_thread(elsewhere)
        running = engine.submit(request(num_steps=1000))
        await asyncio.gather(engine.close(), engine.close())
        with pytest.raises(GenerationError, match="the engine was stopped"):
            await running.result()
    with pytest.raises(GenerationError, match="the engine is not running"):
        engine.submit(request())
    with pytest.raises(GenerationError, match="started or closed before"):
        await engine.start()


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.4])
async def test_closed_while_it_starts(after_s: float) -> None:
    engine = AsyncEngine(EngineConfig(devices="cpu:2", num_threads=1, profile_cache=False))
    starting = asyncio.create_task(engine.start())
    await asyncio.sleep(after_s)
    await asyncio.wait_for(engine.close(), 30)
    with pytest.raises(GenerationError, match="closed"):
        await asyncio.wait_for(starting, 30)
    assert not engine.worker_pids()


# Forks --------------------------------------------------------------------------------------------------------------


def test_a_forked_child_gets_an_error_and_its_parent_does_not_notice(engine: Engine) -> None:
    for use in (
        lambda: engine.generate([request()]),
        lambda: engine.add_request(request()),
        engine.step,
        lambda: engine.abort_request("x"),
        lambda: engine._engine.submit(request()),
        lambda: engine._engine.stats(),
        lambda: asyncio.run(engine._engine.start()),
    ):
        assert f"the engine belongs to process {os.getpid()}, from which this one was forked" in in_child(use)
    for end in (engine.close, engine.__exit__, lambda: asyncio.run(engine._engine.close())):
        assert in_child(end) == "None"
    assert len(engine.generate(request())) == 1


def test_a_childs_end_and_its_garbage_are_no_matter_for_the_parent() -> None:
    holder = [Engine(CONFIG)]

    def forget() -> bool:
        died = weakref.ref(holder.pop())
        gc.collect()
        return died() is None

    pids = worker_pids(holder[0])
    assert in_child(forget) == "True"
    process = multiprocessing.get_context("fork").Process(target=holder[0].close)
    process.start()
    process.join(20)
    assert process.exitcode == 0
    assert len(holder[0].generate(request())) == 1 and worker_pids(holder[0]) == pids
    holder[0].close()


LARGE = re.compile("tetrion-(slab-|weights)")
"""Of an engine's memory; other tests in this process may have left some of the other kinds open."""


def kept_by(pid: int) -> list[str]:
    """What the descriptors of a process are open on."""
    return [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()]


def test_workers_end_with_their_engine_though_a_child_of_it_lives_on(engine: Engine) -> None:
    """A process with an engine (itself the child of one that has an engine) forks a child, which lives on, and is
    killed: workers and fork server end, and the child keeps no memory."""
    read_fd, write_fd = os.pipe()
    if (pid := os.fork()) == 0:  # what is killed; the tests' own process forks it to have its libraries loaded
        become_mortal(100)
        own = Engine(CONFIG)
        server = [child.pid for child in psutil.Process().children()]
        child = os.fork()
        if child == 0:
            time.sleep(100)
            os._exit(0)
        os.write(write_fd, " ".join(map(str, [child, *worker_pids(own), *server])).encode())
        time.sleep(100)
        os._exit(1)
    os.close(write_fd)
    child, *others = map(int, os.read(read_fd, 1000).split())
    os.close(read_fd)
    processes = [psutil.Process(other) for other in others]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        assert not psutil.wait_procs(processes, timeout=20)[1]
        deadline_s = time.monotonic() + 20
        while any(LARGE.search(name) for name in kept_by(child)) and time.monotonic() < deadline_s:
            time.sleep(0.02)  # it may not have come to letting go yet
        assert kept_by(child) and not any(LARGE.search(name) for name in kept_by(child))
    finally:
        os.kill(child, signal.SIGKILL)
