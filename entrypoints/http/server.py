"""`tetrion serve`: listens, starts the engine, serves until told to stop.

The port is taken before the engine is loaded, so that a port in use is known at once. While the engine loads, `/health`
answers and `/ready` says 503. The first SIGINT or SIGTERM ends gracefully: no new connections, running requests get
`SHUTDOWN_TIMEOUT_S` to finish, then the engine stops; the second cuts requests off. A request that is cut off gets an
answer that says so. An engine that dies ends the server.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click
import msgspec
import uvicorn

from tetrion.entrypoints.errors import EXIT_INTERRUPTED, InputError
from tetrion.entrypoints.http.app import create_app
from tetrion.entrypoints.http.service import ImageService
from tetrion.entrypoints.http.store import PictureStore
from tetrion.entrypoints.session import freeze_gc

if TYPE_CHECKING:
    from tetrion.engine.api import AsyncEngine

SHUTDOWN_TIMEOUT_S = 30
CUT_OFF_TIMEOUT_S = 5
BACKLOG = 1024


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The command line of `tetrion serve` without what concerns the engine. `port` 0 picks a free one."""

    host: str = "127.0.0.1"
    port: int = 8000
    store_mb: int = 1024
    public_url: str | None = None
    access_log: bool = False


class Server(uvicorn.Server):
    """uvicorn without its own signal handlers, which would end the process before the engine has stopped."""

    stop_signal: signal.Signals | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop, signals = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
        for signum in signals:
            loop.add_signal_handler(signum, self._stop, signum)
        try:
            yield
        finally:
            for signum in signals:
                loop.remove_signal_handler(signum)

    def _stop(self, signum: signal.Signals) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        self.stop_signal = signum

    async def cut_off(self) -> None:
        """Cancel the requests that still run, and let them be answered. To be called after `serve`."""
        tasks = set(self.server_state.tasks)
        for task in tasks:
            if not task.cancelling():
                task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CUT_OFF_TIMEOUT_S)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises InputError naming what is wrong with host or port."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise InputError(f"host: cannot resolve {host!r}: {getattr(error, 'strerror', error)}") from None
    family, _, _, _, address = infos[0]
    try:
        return socket.create_server(address, family=family, backlog=BACKLOG)
    except OSError as error:
        raise InputError(f"port: cannot listen on {host} port {port}: {error.strerror}") from None


async def serve(options: ServeOptions, engine: AsyncEngine) -> int:
    """Serve until a signal. Returns the exit code: 0 after SIGTERM, 130 after SIGINT. Raises GenerationError if the
    engine does not start or dies."""
    with listen(options.host, options.port) as sock:
        service = ImageService(engine, PictureStore(options.store_mb << 20), options.public_url)
        server = Server(
            uvicorn.Config(
                create_app(service),
                lifespan="off",
                log_config=None,
                access_log=options.access_log,
                timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_S,
            )
        )
        _log_to_stderr()
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        try:
            if await _start(engine, serving):
                freeze_gc()
                service.is_ready = True
                click.echo(f"serving {', '.join(engine.models.specs)} on {url_of(sock)}", err=True)
                await _until_stopped(engine, serving)
        finally:
            service.is_ready = False
            server.should_exit = True
            await serving
            await server.cut_off()
            await engine.__aexit__(None, None, None)
    return EXIT_INTERRUPTED if server.stop_signal is signal.SIGINT else 0


async def _start(engine: AsyncEngine, serving: asyncio.Task[None]) -> bool:
    """Start the engine unless the server is stopped first; says whether it runs."""
    starting = asyncio.create_task(engine.__aenter__())
    try:
        await asyncio.wait((starting, serving), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            return False
        starting.result()
        return True
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)


async def _until_stopped(engine: AsyncEngine, serving: asyncio.Task[None]) -> None:
    """Wait until the server has stopped. Raises what the engine died of if it did so before."""
    ending = asyncio.create_task(engine.ended())
    try:
        await asyncio.wait((ending, serving), return_when=asyncio.FIRST_COMPLETED)
        if ending.done() and (death := ending.result()):
            raise death
    finally:
        ending.cancel()


def url_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn.access").setLevel(logging.INFO)
