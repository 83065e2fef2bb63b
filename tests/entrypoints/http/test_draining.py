"""Stopping: readiness first, then the door, then what runs. The signals are real and sent to this process."""

import asyncio
import os
import signal

import pytest

from tests.entrypoints.http.live import Live, live, until
from tetrion.engine.errors import GenerationError


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


async def is_refused(served: Live) -> bool:
    try:
        _, writer = await served.open()
    except ConnectionRefusedError:
        return True
    writer.close()
    return False


async def test_readiness_ends_at_once_and_requests_are_taken_for_a_while(capsys: pytest.CaptureFixture[str]) -> None:
    async with live(drain_s=1.0) as served:
        slow = asyncio.create_task(served.post(prompt="slow"))
        await until(lambda: served.engine.handles)
        send(signal.SIGTERM)
        await asyncio.sleep(0.05)
        ready = await served.http.get("/ready")
        assert (ready.status_code, ready.json()["error"]["code"]) == (503, "draining")
        assert ready.headers["retry-after"] == "5"
        assert (await served.http.get("/health")).status_code == 200
        answer = await served.post()
        assert (answer.status_code, answer.headers["connection"]) == (200, "close"), "the last of its connection"
        while not await is_refused(served):
            await asyncio.sleep(0.05)
        assert not slow.done() and served.engine.is_running
        served.engine.handles[0].cancel()
        await slow
        assert await served.task == 0
    said = capsys.readouterr().err
    assert "tetrion: SIGTERM: /ready is 503; requests are taken for 1 s more" in said
    assert "tetrion: SIGTERM: stopping; waiting up to 30 s for 1 request to finish (the same again cuts off)" in said


@pytest.mark.parametrize(("signum", "drain_s", "exit_code"), [(signal.SIGINT, 60.0, 130), (signal.SIGTERM, 0.0, 0)])
async def test_without_a_drain_the_door_is_closed_at_once(signum: int, drain_s: float, exit_code: int) -> None:
    async with live(drain_s=drain_s) as served:
        slow = asyncio.create_task(served.post(prompt="slow"))
        await until(lambda: served.engine.handles)
        send(signum)
        while not await is_refused(served):
            await asyncio.sleep(0.05)
        served.engine.handles[0].cancel()
        await slow
        assert await served.task == exit_code


async def test_what_outlasts_the_time_is_cut_off_with_an_answer() -> None:
    async with live(shutdown_timeout_s=0.2) as served:
        slow = asyncio.create_task(served.post(prompt="slow"))
        await until(lambda: served.engine.handles)
        send(signal.SIGTERM)
        response = await slow
        assert (response.status_code, response.json()["error"]["code"]) == (503, "cancelled")
        assert response.headers["retry-after"] == "5"
        assert await served.task == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_drain_and_patience(second: int) -> None:
    async with live(drain_s=3600.0, shutdown_timeout_s=3600.0) as served:
        slow = asyncio.create_task(served.post(prompt="slow"))
        await until(lambda: served.engine.handles)
        send(signal.SIGTERM)
        await asyncio.sleep(0.05)
        send(second)
        assert (await slow).json()["error"]["code"] == "cancelled"
        await served.task


async def test_an_engine_that_dies_while_draining_ends_the_server() -> None:
    with pytest.raises(GenerationError, match="the engine loop ended"):
        async with live(drain_s=3600.0) as served:
            send(signal.SIGTERM)
            await asyncio.sleep(0.05)
            served.engine.die()
            await asyncio.wait([served.task])
            assert await is_refused(served)
