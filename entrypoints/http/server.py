"""`tetrion serve`: listens, starts the engine, serves until told to stop.

The port is taken before the engine is loaded, so that a port in use is known at once. While the engine loads, `/health`
answers and `/ready` says 503. The first SIGINT or SIGTERM ends gracefully (see `draining.py`): no new connections,
running requests get `shutdown_timeout_s` to finish, then the engine stops; the second cuts requests off. A request that
is cut off gets an answer that says so. An engine that dies ends the server. What is being waited for is said on stderr.
"""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import uvicorn

from tetrion.entrypoints.errors import EXIT_INTERRUPTED, InputError
from tetrion.entrypoints.http import logs
from tetrion.entrypoints.http.app import Guards, create_app, parse_origin
from tetrion.entrypoints.http.connections import (
    Connection,
    ConnectionLimits,
    Connections,
    Door,
    most_connections,
)
from tetrion.entrypoints.http.hosts import hosts_for
from tetrion.entrypoints.http.keys import ApiKeys
from tetrion.entrypoints.http.limits import RequestLimits, Waiting
from tetrion.entrypoints.http.service import ImageService
from tetrion.entrypoints.http.store import PictureStore
from tetrion.entrypoints.http.tenants import TrustedProxies
from tetrion.entrypoints.session import freeze_gc
from tetrion.entrypoints.terminal import say

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from tetrion.engine.api import AsyncEngine
from tetrion.engine.roles import ALL, roles_text

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
    log_level: logs.LogLevel = "info"
    log_format: logs.LogFormat = "plain"
    max_n: int | None = None
    max_steps: int | None = None
    max_pixels: int | None = None
    max_waiting_mb: int = 256
    limit_concurrency: int | None = None
    head_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    drain_s: float = 0.0
    shutdown_timeout_s: float = 30.0


class Server(uvicorn.Server):
    """uvicorn behind our own door, and without its signal handlers, which would end the process before the engine has
    stopped."""

    stop_signal: signal.Signals | None = None
    is_loading = True
    """Whether the engine is not up yet."""

    def __init__(
        self, config: uvicorn.Config, service: ImageService, connections: Connections, options: ServeOptions
    ) -> None:
        super().__init__(config)
        self._service, self._connections, self._options = service, connections, options

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        doors = [Door(sock, self._connection, self._connections, self.config.ssl) for sock in sockets or []]
        self.servers = doors  # type: ignore[assignment]
        self._connections.start()
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self._connections.stop()

    def _connection(self) -> Connection:
        return Connection(self._connections, config=self.config, server_state=self.server_state, app_state={})

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
        self.force_exit = self.stop_signal is not None
        can_drain = not (self.force_exit or self.is_loading) and self._options.drain_s > 0
        is_drained = can_drain and signum is signal.SIGTERM
        self.stop_signal = signum
        self._service.is_draining = True
        if is_drained:
            drain_s = self._options.drain_s
            say(f"tetrion: {signum.name}: /ready is 503; requests are taken for {drain_s:g} s more")
            asyncio.get_running_loop().call_later(drain_s, self._end_drain, signum)
        else:
            self._close(signum)

    def _end_drain(self, signum: signal.Signals) -> None:
        if not self.should_exit:
            self._close(signum)

    def _close(self, signum: signal.Signals) -> None:
        self.should_exit = True
        say(self._says_of_stopping(signum))

    def _says_of_stopping(self, signum: signal.Signals) -> str:
        number = len(self.server_state.tasks)
        running = "1 request" if number == 1 else f"{number} requests"
        if self.force_exit:
            return f"tetrion: {signum.name} again: {running} cut off; waiting for the workers to end"
        if number:
            return (
                f"tetrion: {signum.name}: stopping; waiting up to {self._options.shutdown_timeout_s:g} s for {running}"
                " to finish (the same again cuts off)"
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
    origins, keys = tuple(map(parse_origin, options.allow_origins)), ApiKeys(options.api_keys)
    proxies = TrustedProxies(options.trusted_proxies)
    num_connections = most_connections(len(engine.devices))
    with ExitStack() as sockets:
        listening = [sockets.enter_context(sock) for sock in listen(options.host, options.port)]
        hosts = hosts_for([sock.getsockname()[0] for sock in listening], options.allowed_hosts, options.public_url)
        service = _service(options, engine, num_connections)
        guards = Guards(hosts=hosts, keys=keys, proxies=proxies, body_timeout_s=options.body_timeout_s)
        app = create_app(service, origins, guards)
        limits = ConnectionLimits(
            max_connections=num_connections,
            head_timeout_s=options.head_timeout_s,
            body_timeout_s=options.body_timeout_s,
        )
        server = Server(_config(options, app), service, Connections(limits, service.counters), options)
        logs.set_up(options.log_level, options.log_format)
        url, models = url_of(listening[0], is_tls=options.ssl_certfile is not None), ", ".join(engine.models.specs)
        serving = asyncio.create_task(server.serve(sockets=listening))
        try:
            devices = ", ".join(device.name for device in engine.devices)
            roles = roles_text([device.stages for device in engine.devices])
            devices += "" if roles == ALL else f" (roles {roles})"
            say(f"tetrion: loading {models} on {devices}, listening on {url} (/ready says 200 when it is done)")
            if await _start(engine, serving):
                freeze_gc()
                service.is_ready, server.is_loading = True, False
                say(f"serving {models} on {url}")
                say(about(engine, url))
                await _until_stopped(engine, serving)
        finally:
            service.is_ready = False
            server.should_exit = True
            await serving
            await server.cut_off()
            await engine.__aexit__(None, None, None)
    return EXIT_INTERRUPTED if server.stop_signal is signal.SIGINT else 0


def about(engine: AsyncEngine, url: str) -> str:
    """What is served, a line for each model, and how to ask for a picture."""
    lines = []
    for name, spec in engine.models.specs.items():
        sizes, (width, height) = spec.sizes, spec.sizes.default
        lines.append(
            f"  {name}: {sizes.min} to {sizes.max} pixels a side, multiples of {sizes.multiple}; by default"
            f" {width}x{height}, {spec.num_steps} steps"
        )
    body = '{"prompt": "a red circle left of a blue star"}'
    lines.append(f"  try: curl {url}/v1/images/generations -H 'content-type: application/json' -d '{body}'")
    return "\n".join(lines)


def _service(options: ServeOptions, engine: AsyncEngine, num_connections: int) -> ImageService:
    return ImageService(
        engine,
        PictureStore(options.store_mb << 20),
        options.public_url,
        RequestLimits(max_n=options.max_n, max_steps=options.max_steps, max_pixels=options.max_pixels),
        Waiting(options.max_waiting_mb << 20, _at_once(options, num_connections)),
    )


def _at_once(options: ServeOptions, num_connections: int) -> int:
    """Requests that may be served at once: some connections are kept for those that only ask how the server does."""
    at_most = num_connections - max(4, num_connections // 8)
    return min(options.limit_concurrency or at_most, at_most)


def _config(options: ServeOptions, app: ASGIApp) -> uvicorn.Config:
    """Raises InputError for what is wrong with certificate or key."""
    if options.ssl_keyfile is not None and options.ssl_certfile is None:
        raise InputError("ssl_keyfile: takes an ssl_certfile as well")
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=options.access_log,
        proxy_headers=False,  # see http/tenants.py
        timeout_keep_alive=options.keep_alive_s,  # type: ignore[arg-type]
        timeout_graceful_shutdown=options.shutdown_timeout_s,  # type: ignore[arg-type]
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile=options.ssl_keyfile,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise InputError(f"ssl_certfile: {error.strerror or error}") from None
    return config


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


def url_of(sock: socket.socket, is_tls: bool = False) -> str:
    host, port = sock.getsockname()[:2]
    scheme = "https" if is_tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
