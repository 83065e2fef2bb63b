"""`tetrion serve`: listens, starts the engine, serves until told to stop.

The port is taken before the engine is loaded, so that a port in use is known at once. While the engine loads, `/health`
answers and `/ready` says 503. The first SIGINT or SIGTERM ends gracefully: no new connections, running requests get
`SHUTDOWN_TIMEOUT_S` to finish, then the engine stops; the second cuts requests off. A request that is cut off gets an
answer that says so. An engine that dies ends the server. What is being waited for is said on stderr.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import uvicorn

from tetrion.entrypoints.errors import EXIT_INTERRUPTED, InputError
from tetrion.entrypoints.http.app import create_app, parse_origin
from tetrion.entrypoints.http.service import ImageService
from tetrion.entrypoints.http.store import PictureStore
from tetrion.entrypoints.session import freeze_gc
from tetrion.entrypoints.terminal import say

if TYPE_CHECKING:
    from tetrion.engine.api import AsyncEngine

SHUTDOWN_TIMEOUT_S = 30
CUT_OFF_TIMEOUT_S = 5
BACKLOG = 1024
SAY_AGAIN_S = 10.0
"""So often it is said that the engine is still being started."""
NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
NUM_FREE_PORTS_TRIED = 20

Address = tuple[int, tuple[Any, ...]]
"""Family, and what sockets of it bind to: host, port, and more in IPv6."""


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The command line of `tetrion serve` without what concerns the engine. `port` 0 picks a free one."""

    host: str = "127.0.0.1"
    port: int = 8000
    store_mb: int = 1024
    public_url: str | None = None
    allow_origins: tuple[str, ...] = ()
    keep_alive_s: float = 75.0
    access_log: bool = False


class Server(uvicorn.Server):
    """uvicorn without its own signal handlers, which would end the process before the engine has stopped."""

    stop_signal: signal.Signals | None = None
    is_loading = True
    """Whether the engine is not up yet."""

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
        say(self._says_of_stopping(signum))

    def _says_of_stopping(self, signum: signal.Signals) -> str:
        number = len(self.server_state.tasks)
        running = "1 request" if number == 1 else f"{number} requests"
        if self.force_exit:
            return f"tetrion: {signum.name} again: {running} cut off; waiting for the workers to end"
        if number:
            return (
                f"tetrion: {signum.name}: stopping; waiting up to {SHUTDOWN_TIMEOUT_S:g} s for {running} to finish"
                " (the same again cuts off)"
            )
        engine = "the engine, which is still starting, and its workers" if self.is_loading else "the workers"
        return f"tetrion: {signum.name}: stopping; waiting for {engine} to end"

    async def cut_off(self) -> None:
        """Cancel the requests that still run, and let them be answered. To be called after `serve`."""
        tasks = set(self.server_state.tasks)
        for task in tasks:
            if not task.cancelling():
                task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CUT_OFF_TIMEOUT_S)


def listen(host: str, port: int) -> list[socket.socket]:
    """Listening sockets, one for each address of `host` that this machine has, all of one port; `::` is every address
    of IPv4, too. Raises InputError naming what is wrong with host or port."""
    addresses = _addresses(host.removeprefix("[").removesuffix("]"), port)
    for is_last in (False,) * (NUM_FREE_PORTS_TRIED - 1) + (True,):
        try:
            return _listen_on(addresses, host)
        except InputError:
            if is_last or port or len(addresses) == 1:  # another free port may be free at all addresses
                raise
    raise AssertionError("unreachable")


def _addresses(host: str, port: int) -> list[Address]:
    """Each once. Raises InputError."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE) if host else []
    except (OSError, UnicodeError, ValueError) as error:
        raise InputError(f"host: cannot resolve {host!r}: {getattr(error, 'strerror', None) or error}") from None
    if not infos:
        raise InputError("host: must not be empty; 0.0.0.0 is every address of IPv4, :: of both families")
    return list(dict.fromkeys((family, address) for family, _, _, _, address in infos))


def _listen_on(addresses: list[Address], host: str) -> list[socket.socket]:
    """Raises InputError if there is none to listen on, or one is taken."""
    missing: OSError | None = None
    with ExitStack() as undo:
        sockets: list[socket.socket] = []
        for family, (name, port, *scope) in addresses:
            port = sockets[0].getsockname()[1] if sockets else port
            is_dual = family == socket.AF_INET6 and name == "::" and socket.has_dualstack_ipv6()
            try:
                sock = socket.create_server(
                    (name, port, *scope),
                    family=family,
                    backlog=BACKLOG,
                    dualstack_ipv6=is_dual,
                )
            except OSError as error:
                if error.errno not in NO_SUCH_ADDRESS:
                    raise InputError(f"port: cannot listen on {host} port {port}: {_reason(error)}") from None
                missing = error
                continue
            sockets.append(undo.enter_context(sock))
        if not sockets:
            assert missing is not None
            raise InputError(f"host: cannot listen on {host}: {_reason(missing)}")
        undo.pop_all()
        return sockets


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).partition(" (while")[0]


async def serve(options: ServeOptions, engine: AsyncEngine) -> int:
    """Serve until a signal. Returns the exit code: 0 after SIGTERM, 130 after SIGINT. Raises GenerationError if the
    engine does not start or dies."""
    origins = tuple(map(parse_origin, options.allow_origins))
    with ExitStack() as sockets:
        listening = [sockets.enter_context(sock) for sock in listen(options.host, options.port)]
        service = ImageService(engine, PictureStore(options.store_mb << 20), options.public_url)
        server = Server(
            uvicorn.Config(
                create_app(service, origins),
                lifespan="off",
                log_config=None,
                access_log=options.access_log,
                timeout_keep_alive=options.keep_alive_s,  # type: ignore[arg-type]
                timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_S,
            )
        )
        _log_to_stderr()
        url, models = url_of(listening[0]), ", ".join(engine.models.specs)
        serving = asyncio.create_task(server.serve(sockets=listening))
        try:
            devices = ", ".join(device.name for device in engine.devices)
            say(f"tetrion: loading {models} on {devices}, listening on {url} (/ready says 200 when it is done)")
            if await _start(engine, serving):
                freeze_gc()
                service.is_ready, server.is_loading = True, False
                say(f"serving {models} on {url}")
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
    starting, begun_s = asyncio.create_task(engine.__aenter__()), time.monotonic()
    try:
        while not (starting.done() or serving.done()):
            await asyncio.wait((starting, serving), return_when=asyncio.FIRST_COMPLETED, timeout=SAY_AGAIN_S)
            if not (starting.done() or serving.done()):
                say(f"tetrion: still loading, for {time.monotonic() - begun_s:.0f} s")
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
