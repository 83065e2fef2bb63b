"""Listening, starting and stopping, on a test double. The signals are real and sent to this process."""

import asyncio
import os
import signal
import socket
from collections.abc import Callable

import httpx
import pytest

from tests.entrypoints.conftest import FakeEngine, FakeFactory
from tetrion.engine.config import EngineConfig
from tetrion.engine.request import GenerationError
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.http.server import ServeOptions, listen, serve

Tetrion = Callable[..., int]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


class SlowEngine(FakeEngine):
    """Never gets ready."""

    was_cancelled = False

    async def __aenter__(self) -> "SlowEngine":
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        return self


async def answer(port: int, path: str, status: int) -> httpx.Response:
    """Ask until the answer has this status."""
    async with asyncio.timeout(20), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        while True:
            try:
                response = await http.get(path)
                if response.status_code == status:
                    return response
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(("signum", "exit_code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
async def test_a_signal_lets_running_requests_finish_and_stops_the_engine(signum: int, exit_code: int) -> None:
    port, engine = free_port(), FakeEngine(EngineConfig(devices="cpu:1"))
    running = asyncio.create_task(serve(ServeOptions(port=port), engine))  # type: ignore[arg-type]
    await answer(port, "/ready", 200)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        posting = asyncio.create_task(http.post("/v1/images/generations", json={"prompt": "a star", "n": 10}))
        while len(engine.handles) < 10:
            await asyncio.sleep(0)
        os.kill(os.getpid(), signum)
        assert (await posting).status_code == 200
    assert await running == exit_code
    assert not engine.is_running
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_health_answers_and_ready_does_not_while_the_engine_loads() -> None:
    port, engine = free_port(), SlowEngine(EngineConfig(devices="cpu:1"))
    running = asyncio.create_task(serve(ServeOptions(port=port), engine))  # type: ignore[arg-type]
    await answer(port, "/health", 200)
    await answer(port, "/ready", 503)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0
    assert engine.was_cancelled


async def test_an_engine_that_does_not_start_ends_the_server() -> None:
    port, engine = free_port(), FakeEngine(EngineConfig(devices="cpu:1"), GenerationError("no worker"))
    with pytest.raises(GenerationError, match="no worker"):
        await serve(ServeOptions(port=port), engine)  # type: ignore[arg-type]
    listen("127.0.0.1", port).close()


def test_a_port_in_use_is_bad_input_and_starts_no_engine(
    tetrion: Tetrion, factory: FakeFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert tetrion("serve", "--port", port, "--devices", "cpu:1") == 2
    assert f"port: cannot listen on 127.0.0.1 port {port}: Address already in use" in capsys.readouterr().err
    assert factory.last.num_starts == 0


def test_hosts_and_ports_that_cannot_be(tetrion: Tetrion, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="host: cannot resolve"):
        listen("no such host", 0)
    with pytest.raises(InputError, match=r"port: cannot listen on 192\.0\.2\.1"):
        listen("192.0.2.1", 0)
    assert tetrion("serve", "--port", 65536) == 2
    assert "--port" in capsys.readouterr().err
