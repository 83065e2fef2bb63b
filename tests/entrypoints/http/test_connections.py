"""Connections that are slow, silent, many or not HTTP, on the real door. Nothing is said of how quick something is."""

import asyncio
import logging
import os
import resource
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.entrypoints.http.live import GENERATIONS, Live, head, live
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.http import connections, server
from tetrion.entrypoints.http.connections import most_connections

QUICK = {"head_timeout_s": 0.3, "body_timeout_s": 0.3, "keep_alive_s": 5.0}


@pytest.fixture(autouse=True)
def swept_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SWEEP_S", 0.05)
    monkeypatch.setattr(connections, "BODY_GRACE_S", 0.1)


@pytest.fixture(autouse=True)
def nothing_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING or r.exc_info]


async def trickle(served: Live, sent: bytes, byte: bytes = b"x") -> bytes:
    """Send `sent` and then a byte at a time until the server closes; what it has answered."""
    reader, writer = await served.open(sent)
    reading = asyncio.create_task(reader.read())
    async with asyncio.timeout(20):
        while not reading.done():
            writer.write(byte)
            await asyncio.sleep(0.02)
    writer.close()
    return b"" if reading.exception() else reading.result()


async def test_silent_connections_and_slow_heads_are_closed() -> None:
    async with live(**QUICK) as served:
        assert await served.raw(b"") == b""
        for sent in (b"G", b"GET /health HTTP/1.1\r\n", head("GET", "/health")[:-2]):
            answer = await served.raw(sent)
            assert answer.startswith(b"HTTP/1.1 408 ") and b'"head_timeout"' in answer
        answer = await trickle(served, head("GET", "/health")[:-2] + b"a: ")
        assert answer in (b"", answer) and answer[:13] in (b"", b"HTTP/1.1 408 ")
        assert "head_timeout" in await served.metrics()


async def test_a_slow_second_head_is_closed_as_well() -> None:
    async with live(**QUICK) as served:
        pipelined = await served.raw(head("GET", "/health") + b"GET ")
        assert pipelined.startswith(b"HTTP/1.1 200 ") and b"HTTP/1.1 408 " in pipelined
        reader, writer = await served.open(head("GET", "/health"))
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        writer.write(b"GET ")
        async with asyncio.timeout(20):
            assert b"HTTP/1.1 408 " in await reader.read()
        writer.close()


async def test_slow_bodies_are_answered_and_closed() -> None:
    async with live(**QUICK) as served:
        length, chunked = "content-length: 1000", "transfer-encoding: chunked"
        for sent in (head("POST", GENERATIONS, length) + b"{", head("POST", GENERATIONS, chunked) + b"1\r\n{\r\n"):
            answer = await served.raw(sent)
            assert answer.startswith(b"HTTP/1.1 408 ") and b'"body_timeout"' in answer
        answer = await trickle(served, head("POST", GENERATIONS, length))
        assert answer[:13] in (b"", b"HTTP/1.1 408 ")


async def test_a_body_that_nobody_reads_does_not_keep_the_connection() -> None:
    async with live(**QUICK) as served:
        for method, path, status in (("GET", "/health", b"200"), ("POST", "/nothing", b"404")):
            answer = await trickle(served, head(method, path, "content-length: 100000"))
            assert answer == b"" or answer.startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize("path", [GENERATIONS, "/nothing"])
@pytest.mark.parametrize("is_chunked", [False, True])
async def test_an_answer_to_half_a_body_is_not_lost(
    path: str, is_chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "LINGER_S", 15.0)
    length = "transfer-encoding: chunked" if is_chunked else "content-length: 8000000"
    chunk = b"200000\r\n" + b" " * 0x200000 + b"\r\n" if is_chunked else b" " * 2_000_000
    async with live() as served:
        reader, writer = await served.open(head("POST", path, length, "connection: close"))
        for _ in range(4):
            writer.write(chunk)
            await writer.drain()
        async with asyncio.timeout(20):
            answer = await reader.read()
        writer.close()
        assert answer.startswith(b"HTTP/1.1 413 " if path == GENERATIONS else b"HTTP/1.1 404 ")


async def test_a_body_that_says_it_is_too_long_is_refused_before_it_comes() -> None:
    async with live() as served:
        reader, writer = await served.open(head("POST", GENERATIONS, "content-length: 1048577"))
        async with asyncio.timeout(20):
            assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
        writer.close()


async def test_a_request_that_is_served_is_not_hurried() -> None:
    async with live(**QUICK) as served:
        posting = asyncio.create_task(served.post(prompt="slow"))
        await asyncio.sleep(0.8)
        assert not posting.done() and len(served.engine.handles) == 1
        served.engine.handles[0].cancel()
        assert (await posting).status_code == 503


async def test_the_longest_unheard_makes_room_for_a_newcomer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "most_connections", lambda num_devices: 20)
    async with live() as served:
        posting = [asyncio.create_task(served.post(prompt="slow")) for _ in range(10)]
        silent = [await served.open(b"POST / ") for _ in range(60)]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{served.port}") as probe:
            for _ in range(20):
                assert (await probe.get("/health", headers={"connection": "close"})).status_code == 200
            assert 'connections_closed_total{reason="crowded"}' in (await probe.get("/metrics")).text
        assert not any(task.done() for task in posting) and len(served.engine.handles) == 10
        for handle in served.engine.handles:
            handle.cancel()
        assert {response.status_code for response in await asyncio.gather(*posting)} == {503}
        for _, writer in silent:
            writer.close()


async def test_where_all_are_served_a_newcomer_waits_at_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "most_connections", lambda num_devices: 20)
    monkeypatch.setattr(server, "_at_once", lambda options, num_connections: 100)
    async with live() as served:
        posting = [asyncio.create_task(served.post(prompt="slow")) for _ in range(20)]
        while len(served.engine.handles) < 20:
            await asyncio.sleep(0.01)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{served.port}", timeout=20) as probe:
            asking = asyncio.create_task(probe.get("/health"))
            await asyncio.sleep(0.3)
            assert not asking.done()
            for handle in served.engine.handles:
                handle.cancel()
            assert (await asking).status_code == 200
        await asyncio.gather(*posting)


async def test_a_client_that_does_not_read_its_answer_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SEND_WINDOW_S", 0.3)
    async with live() as served:
        sock = socket.create_connection(("127.0.0.1", served.port))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(20):
            while True:  # pipelined, so that the answers do not fit into the socket
                try:
                    await asyncio.wait_for(loop.sock_sendall(sock, head("GET", "/metrics") * 100), 0.5)
                except TimeoutError:
                    break
                except ConnectionError:
                    break
            while "send_timeout" not in await served.metrics():
                await asyncio.sleep(0.05)
        sock.close()


HOSTILE = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"\x00" * 100,
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /health HTTP/1.1\r\nhost: localhost\r\na: " + b"x" * 200_000,
    b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
    head("GET", "/health", *(f"h{i}: {'y' * 50}" for i in range(2000))),
    head("POST", GENERATIONS, "content-length: -1"),
    head("POST", GENERATIONS, "content-length: 1, 2"),
    head("POST", GENERATIONS, "content-length: 99999999999999999999999"),
    head("POST", GENERATIONS, "content-length: 5", "content-length: 6"),
    head("POST", GENERATIONS, "content-length: 3", "transfer-encoding: chunked")
    + b"0\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n",
    head("POST", GENERATIONS, "transfer-encoding: xchunked"),
    head("POST", GENERATIONS, "transfer-encoding: chunked, chunked"),
    head("POST", GENERATIONS, "transfer-encoding : chunked"),
    head("POST", GENERATIONS, "transfer-encoding: chunked") + b"zz\r\n",
    head("POST", GENERATIONS, "transfer-encoding: chunked") + b"5;" + b"e" * 100_000 + b"\r\n",
    head("POST", GENERATIONS, "transfer-encoding: chunked") + b"FFFFFFFFFFFFFFFFFF\r\nx",
    head("POST", "/nothing", "transfer-encoding: chunked") + b"1\r\nx\r\nzz\r\n",
    head("POST", GENERATIONS, "content-length: 2") + b"[]" + head("POST", GENERATIONS, "content-length: x"),
    head("GET", "/health", "upgrade: websocket", "connection: upgrade", "sec-websocket-key: x"),
    head("GET", "/health", "upgrade: h2c", "connection: upgrade, http2-settings"),
    head("POST", GENERATIONS, "expect: 100-continue", "content-length: 10"),
    b"GET http://evil.example/v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nhost: localhost\r\n\r\n",
    b"CONNECT evil.example:443 HTTP/1.1\r\nhost: localhost\r\n\r\n",
    b"TRACE /health HTTP/1.1\r\nhost: localhost\r\n\r\n",
    b"GET /%ff%00%2e%2e/ HTTP/1.1\r\nhost: localhost\r\n\r\n",
    b"GET /health HTTP/1.1\nhost: localhost\n\n",
    b"GET /health HTTP/1.0\r\n\r\n",
    head("GET", "/health") * 50,
    head("POST", GENERATIONS, "content-length: 16") + b'{"prompt": "a"}' + b"\n" + head("GET", "/metrics"),
]


async def test_what_is_hostile_or_no_http_is_refused_or_served_and_closed() -> None:
    async with live(**QUICK | {"keep_alive_s": 1.0}, access_log=True) as served:
        answers = await asyncio.gather(*map(served.raw, HOSTILE))
        for sent, answer in zip(HOSTILE, answers, strict=True):
            statuses = [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]]
            assert all(status in b"100 200 400 404 405 408 413 421" for status in statuses), (sent[:300], answer[:300])
            if b"transfer-encoding" in sent and b"content-length" in sent:
                assert statuses == [b"400"]
        assert (await served.http.get("/health")).status_code == 200


async def test_half_open_and_reset_connections_leave_nothing() -> None:
    async with live(**QUICK) as served:
        await served.raw(head("GET", "/health"), ends=True)
        for sent in (b"", b"GET ", head("POST", GENERATIONS, "content-length: 10") + b"{", head("GET", "/metrics")):
            sock = socket.create_connection(("127.0.0.1", served.port))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            sock.sendall(sent)
            sock.close()
        async with asyncio.timeout(10):
            while "tetrion_http_connections 1.0" not in await served.metrics():
                await asyncio.sleep(0.02)


def test_descriptors_are_left_for_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    num_open = len(os.listdir("/dev/fd"))
    limit = num_open + 1000
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    assert 900 < most_connections(2) < 940
    assert most_connections(8) < most_connections(2)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (num_open + 90, limit))
    with pytest.raises(InputError, match=r"devices: 2 take about .* descriptors, .* \(ulimit -n\)"):
        most_connections(2)


# TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    try:
        subprocess.run([*command.split(), "-keyout", key, "-out", cert], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs openssl")
    return {"ssl_certfile": cert, "ssl_keyfile": key}


async def test_https(certificate: dict[str, Path]) -> None:
    async with live(**certificate, **QUICK) as served:
        assert (await served.post(response_format="url")).json()["data"][0]["url"].startswith("https://127.0.0.1:")
        assert await served.raw(b"") == b"", "no handshake"
        assert await served.raw(head("GET", "/health")) in (b"", b"\x15\x03\x01\x00\x02\x02\x46"), "plain HTTP"
        context = ssl._create_unverified_context()
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port, ssl=context)
        writer.write(b"GET /")
        assert (await reader.read()).startswith(b"HTTP/1.1 408 ")
        writer.close()
        assert (await served.http.get("/health")).status_code == 200


async def test_silent_handshakes_make_room(certificate: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "most_connections", lambda num_devices: 20)
    async with live(**certificate) as served:
        silent = [await served.open() for _ in range(60)]
        for _ in range(5):
            assert (await served.http.get("/health", headers={"connection": "close"})).status_code == 200
        for _, writer in silent:
            writer.close()


def test_certificates_that_are_none(
    tetrion: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bad := tmp_path / "bad.pem").write_text("no certificate")
    for options in (("--ssl-certfile", tmp_path / "missing"), ("--ssl-certfile", bad), ("--ssl-keyfile", bad)):
        assert tetrion("serve", "--port", 0, "--devices", "cpu:1", *options) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("tetrion: error: ssl_") for line in lines), lines
