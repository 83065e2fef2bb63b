"""`serve` as the command runs it, on a test double of the engine: our own door, guards and signals. Plain sockets."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from tests.entrypoints.conftest import FakeEngine
from tetrion.engine.config import EngineConfig
from tetrion.entrypoints.http.server import ServeOptions, serve

GENERATIONS = "/v1/images/generations"
JSON = "content-type: application/json"


class Live:
    def __init__(self, port: int, engine: FakeEngine, task: asyncio.Task[int], scheme: str) -> None:
        self.port, self.engine, self.task = port, engine, task
        self.http = httpx.AsyncClient(base_url=f"{scheme}://127.0.0.1:{port}", timeout=20, verify=False)

    async def post(self, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        return await self.http.post(GENERATIONS, json={"prompt": "a star"} | body, headers=headers)

    async def open(self, sent: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(sent)
        return reader, writer

    async def raw(self, sent: bytes, ends: bool = False) -> bytes:
        """Everything that is answered until the server closes."""
        reader, writer = await self.open(sent)
        if ends:
            writer.write_eof()
        async with asyncio.timeout(20):
            try:
                return await reader.read()
            except ConnectionError:
                return b""
            finally:
                writer.close()

    async def metrics(self, headers: dict[str, str] | None = None) -> str:
        return (await self.http.get("/metrics", headers=headers)).text


@asynccontextmanager
async def live(**options: Any) -> AsyncIterator[Live]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    engine = FakeEngine(EngineConfig(devices="cpu:1"))
    task = asyncio.create_task(serve(ServeOptions(port=port, **options), engine))  # type: ignore[arg-type]
    served = Live(port, engine, task, "https" if "ssl_certfile" in options else "http")
    try:
        async with asyncio.timeout(20):
            while not engine.is_running:
                assert not task.done(), task.result()
                await asyncio.sleep(0.01)
        yield served
    finally:
        await served.http.aclose()
        for _ in range(2):
            if not task.done():
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(0.02)
        await task


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def head(method: str = "POST", path: str = GENERATIONS, *lines: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "host: localhost", JSON, *lines, "", ""]).encode()
