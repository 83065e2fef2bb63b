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
from tetrion.engine.errors import GenerationError
from tetrion.entrypoints.cli import run
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.http import server
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


class ShortLivedEngine(FakeEngine):
    """Dies soon after it has started."""

    async def __aenter__(self) -> "ShortLivedEngine":
        await super().__aenter__()
        asyncio.get_running_loop().call_later(0.1, self.die)
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


@pytest.mark.parametrize(("num_signals", "grace_s"), [(1, 0.2), (2, 60)])
async def test_a_request_that_is_cut_off_is_told_so(
    num_signals: int, grace_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    port, engine = free_port(), FakeEngine(EngineConfig(devices="cpu:1"))
    options = ServeOptions(port=port, shutdown_timeout_s=grace_s)
    running = asyncio.create_task(serve(options, engine))  # type: ignore[arg-type]
    await answer(port, "/ready", 200)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
        posting = asyncio.create_task(http.post("/v1/images/generations", json={"prompt": "a slow star", "n": 2}))
        while len(engine.handles) < 2:
            await asyncio.sleep(0)
        for _ in range(num_signals):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.3)
        response = await posting
    assert (response.status_code, response.json()["error"]["code"]) == (503, "cancelled")
    assert response.json()["error"]["message"] == "The server is shutting down." and response.headers["x-request-id"]
    assert await running == 0
    assert not any(record.exc_info for record in caplog.records)
    assert not engine.is_running and all(handle.is_cancelled for handle in engine.handles)


async def test_an_engine_that_dies_ends_the_server() -> None:
    port, engine = free_port(), FakeEngine(EngineConfig(devices="cpu:1"))
    running = asyncio.create_task(serve(ServeOptions(port=port), engine))  # type: ignore[arg-type]
    await answer(port, "/ready", 200)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
        posting = asyncio.create_task(http.post("/v1/images/generations", json={"prompt": "a slow star"}))
        while not engine.handles:
            await asyncio.sleep(0)
        engine.die()
        response = await posting
    assert (response.status_code, response.json()["error"]["code"]) == (500, "generation_failed")
    with pytest.raises(GenerationError, match="the engine loop ended"):
        await asyncio.wait_for(running, 10)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


def test_the_exit_code_of_a_server_whose_engine_dies(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--port", "0", "--devices", "cpu:1"], ShortLivedEngine) == 1  # type: ignore[arg-type]
    assert "the engine loop ended" in capsys.readouterr().err


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
    close_all(listen("127.0.0.1", port))


def close_all(sockets: list[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="needs IPv6")


@needs_ipv6
@pytest.mark.parametrize("host", ["::", "[::]", "localhost"])
def test_both_families_are_listened_on(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = socket.getaddrinfo

    def both(name: str, *further: int, **hints: int) -> list[object]:
        names = ("::1", "127.0.0.1") if name == "localhost" else (name,)
        return [info for one in names for info in ask(one, *further, **hints)]  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    sockets = listen(host, 0)
    try:
        (port,) = {sock.getsockname()[1] for sock in sockets}
        for address in ("127.0.0.1", "::1"):
            socket.create_connection((address, port), timeout=5).close()
        with pytest.raises(InputError, match=r"port: cannot listen on 127\.0\.0\.1 port .*: Address already in use"):
            listen("127.0.0.1", port)
    finally:
        close_all(sockets)


def test_a_name_with_addresses_of_others_is_listened_on_at_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def several(name: str, port: int, **hints: int) -> list[object]:
        of_ipv4 = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*of_ipv4, (address, port)) for address in ("192.0.2.1", "127.0.0.1", "127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", several)
    sockets = listen("a.name", 0)
    assert [sock.getsockname()[0] for sock in sockets] == ["127.0.0.1"]
    close_all(sockets)


async def test_idle_connections_outlast_those_of_proxies() -> None:
    assert ServeOptions().keep_alive_s > 60
    for keep_alive_s, is_kept in ((0.1, False), (30.0, True)):
        port, engine = free_port(), FakeEngine(EngineConfig(devices="cpu:1"))
        options = ServeOptions(port=port, keep_alive_s=keep_alive_s)
        running = asyncio.create_task(serve(options, engine))  # type: ignore[arg-type]
        await answer(port, "/ready", 200)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await reader.readuntil(b'{"status":"ok"}')).startswith(b"HTTP/1.1 200")
        await asyncio.sleep(0.5)
        assert reader.at_eof() is not is_kept
        writer.close()
        os.kill(os.getpid(), signal.SIGTERM)
        assert await running == 0


async def test_a_server_says_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "SAY_AGAIN_S", 0.05)
    port, slow = free_port(), SlowEngine(EngineConfig(devices="cpu:2"))
    running = asyncio.create_task(serve(ServeOptions(port=port), slow))  # type: ignore[arg-type]
    await answer(port, "/ready", 503)
    await asyncio.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)
    assert await running == 130
    said = capsys.readouterr().err
    assert f"loading shapes on cpu:0, cpu:1, listening on http://127.0.0.1:{port} (/ready" in said
    assert "still loading, for " in said and "SIGINT: stopping; waiting for the engine, which is still st" in said

    port, engine = free_port(), FakeEngine(EngineConfig(devices="cpu:1"))
    running = asyncio.create_task(serve(ServeOptions(port=port), engine))  # type: ignore[arg-type]
    await answer(port, "/ready", 200)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        posting = asyncio.create_task(http.post("/v1/images/generations", json={"prompt": "a slow star"}))
        while not engine.handles:
            await asyncio.sleep(0)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.2)
        assert (await posting).status_code == 503
    assert await running == 0
    said = capsys.readouterr().err
    assert "SIGTERM: stopping; waiting up to 30 s for 1 request to finish" in said
    assert "SIGTERM again: 1 request" in said


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
    with pytest.raises(InputError, match=r"host: cannot resolve 'a\.\.b': .*label empty"):
        listen("a..b", 0)
    with pytest.raises(InputError, match=r"host: cannot listen on 192\.0\.2\.1: Cannot assign"):
        listen("192.0.2.1", 0)
    with pytest.raises(InputError, match="host: must not be empty"):
        listen("", 0)
    assert tetrion("serve", "--allow-origin", "localhost:3000", "--devices", "cpu:1") == 2
    assert tetrion("serve", "--host", "a..b") == 2
    assert tetrion("serve", "--port", 65536) == 2
    assert "--port" in capsys.readouterr().err
