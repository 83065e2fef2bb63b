"""Connections: how many there may be, and how long one may keep the server waiting.

A connection that has not sent a whole request is *unheard*: silent, in the middle of a head or a body, or idle between
requests. Only these can be many without work behind them, so they bear the limits:

    accepted ──▶ HEAD ──(whole head)──▶ BODY ──(whole body)──▶ heard ──(answered)──▶ IDLE ──(first byte)──▶ HEAD
                  │ head_timeout_s       │ body_timeout_s                             │ uvicorn's keep-alive time
                  ▼                      ▼                                            ▼
                408, closed            408, closed                                  closed

When as many connections are open as there may be, the one that has been unheard longest is closed for a newcomer: a
probe gets in at any time. `max_connections` leaves the engine the descriptors that it needs. A client that does not
read its answer is closed once it takes less than `SEND_WINDOW_BYTES` in `SEND_WINDOW_S`.

Whoever is answered before the whole request is there may still be sending it. A socket that is closed with something
unread resets the connection, and the answer may be lost by that: so it is read from, for up to `LINGER_S`.
"""

import asyncio
import logging
import os
import resource
import socket
import ssl
from collections.abc import Callable
from typing import Any, Literal

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.http.counters import HttpCounters
from tetrion.entrypoints.http.errors import ApiError, error_response

LOGGER = "tetrion.http.connections"
"""Of what clients send that is not HTTP it has a warning each: anybody could fill the log, so it is set to errors."""
SWEEP_S = 0.5
ACCEPTS_AT_ONCE = 16
ACCEPT_PAUSE_S = 0.1
SEND_WINDOW_S, SEND_WINDOW_BYTES = 30.0, 32 << 10
LINGER_S = 2.0
BODY_GRACE_S = 2.0
"""A handler that reads the body gives up first and answers; this is for those that have answered without reading it."""
MOST_CONNECTIONS = 1 << 16
FEWEST_CONNECTIONS = 16
ENGINE_DESCRIPTORS, DEVICE_DESCRIPTORS = 48, 16
"""What an engine opens at most, and for each of its devices, workers that are started again included."""

Phase = Literal["head", "body", "idle", "heard"]


class ConnectionLimits(msgspec.Struct, frozen=True, kw_only=True):
    max_connections: int = MOST_CONNECTIONS
    head_timeout_s: float = 10.0
    body_timeout_s: float = 30.0


def most_connections(num_devices: int) -> int:
    """As many as descriptors are left for, beside an engine of so many devices that has yet to start. Raises
    InputError."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    needed = len(os.listdir("/dev/fd")) + ENGINE_DESCRIPTORS + DEVICE_DESCRIPTORS * num_devices
    if limit < needed + FEWEST_CONNECTIONS:
        raise InputError(
            f"devices: {num_devices} take about {needed} descriptors, and {FEWEST_CONNECTIONS} are for connections, but"
            f" this process may open {limit} only (ulimit -n)"
        )
    return min(limit - needed, MOST_CONNECTIONS)


class Connections:
    """All connections of a server."""

    def __init__(self, limits: ConnectionLimits, counters: HttpCounters) -> None:
        self.limits, self.counters = limits, counters
        self._open: set[Connection] = set()
        self._unheard: dict[Connection, None] = {}  # longest unheard first
        self._sweeping: asyncio.TimerHandle | None = None
        self.on_room: list[Callable[[], None]] = []
        """Called when a connection has ended, or could be."""

    @property
    def is_full(self) -> bool:
        return len(self._open) >= self.limits.max_connections

    @property
    def can_make_room(self) -> bool:
        return bool(self._unheard)

    def make_room(self) -> None:
        """Close the connection that has been unheard longest; one that still takes an answer only if all do."""
        victim = next((one for one in self._unheard if not one.is_sending), next(iter(self._unheard)))
        self.left(victim)
        victim.cut("crowded")

    def entered(self, connection: "Connection") -> None:
        self._open.add(connection)
        self.counters.open.set(len(self._open))
        self.now_in(connection, "head")

    def now_in(self, connection: "Connection", phase: Phase) -> None:
        self._unheard.pop(connection, None)
        if phase != "heard" and connection in self._open:
            self._unheard[connection] = None
            self._there_may_be_room()

    def left(self, connection: "Connection") -> None:
        if connection in self._open:
            self._open.discard(connection)
            self._unheard.pop(connection, None)
            self.counters.open.set(len(self._open))
            self._there_may_be_room()

    def _there_may_be_room(self) -> None:
        for listen in self.on_room:
            listen()

    def start(self) -> None:
        """Begin to look after time limits."""
        loop = asyncio.get_running_loop()
        self._sweeping = loop.call_later(SWEEP_S, self.start)
        now_s = loop.time()
        for connection in list(self._open):
            connection.check(now_s)

    def stop(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()


class Connection(H11Protocol):
    """uvicorn's protocol with time limits, and errors in our form. It counts from its acceptance on, that is with TLS
    before its handshake (`connecting`)."""

    def __init__(self, connections: Connections, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.logger = logging.getLogger(LOGGER)
        self._connections = connections
        self.connecting: asyncio.Task[Any] | None = None
        self._phase: Phase = "head"
        self._since_s = self.loop.time()
        self._is_silent = True
        self._unsent_bytes, self._unsent_since_s = 0, self._since_s
        self._has_unsent = self._is_lost = False
        self.app_state = {"is_lost": lambda: self._is_lost}
        connections.entered(self)

    @property
    def is_sending(self) -> bool:
        return self._unsent_bytes > 0

    @property
    def is_amid_request(self) -> bool:
        """The client may be sending the rest of a request."""
        has_ended = self.conn.their_state in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED)
        return not (has_ended or self._is_silent or self._phase == "idle")

    # From the transport -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_Lingering(transport, self))  # type: ignore[arg-type]
        self.transport.set_write_buffer_limits(high=1, low=0)  # whoever may write again knows that all is sent

    def pause_writing(self) -> None:
        self._has_unsent = True
        super().pause_writing()

    def resume_writing(self) -> None:
        self._has_unsent = False
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = exc is not None or self._has_unsent
        self._connections.left(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._is_silent = False
        if not self.transport.is_closing():
            super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        self._note_phase()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._note_phase()

    def send_400_response(self, msg: str) -> None:
        self._connections.counters.closed.labels("invalid_http").inc()
        self._answer_and_close(ApiError(400, "This is not valid HTTP/1.1.", code="invalid_http"))

    def _should_upgrade(self) -> bool:
        return False

    # Time limits --------------------------------------------------------------------------------------------------

    def check(self, now_s: float) -> None:
        """Close what has lasted too long."""
        limits, waited_s = self._connections.limits, now_s - self._since_s
        if self.transport is not None and self.transport.is_closing():
            self._check_sending(now_s)
        elif self._phase == "head" and waited_s > limits.head_timeout_s:
            self._timed_out("head_timeout", f"The head did not arrive within {limits.head_timeout_s:g} s.")
        elif self._phase == "body" and waited_s > limits.body_timeout_s + BODY_GRACE_S:
            self._timed_out("body_timeout", f"The body did not arrive within {limits.body_timeout_s:g} s.")
        elif self.transport is not None:
            self._check_sending(now_s)

    def cut(self, reason: str) -> None:
        """End the connection without a word."""
        self._connections.counters.closed.labels(reason).inc()
        if self.transport is not None:
            self.transport.abort()
        elif self.connecting is not None:
            self.connecting.cancel()

    def _timed_out(self, reason: str, message: str) -> None:
        if self._is_silent or self.transport is None or self.transport.is_closing():
            self.cut(reason)
            return
        self._connections.counters.closed.labels(reason).inc()
        self._answer_and_close(ApiError(408, message, code=reason))

    def _check_sending(self, now_s: float) -> None:
        unsent_bytes = self.transport.get_write_buffer_size()
        if unsent_bytes == 0 or unsent_bytes > self._unsent_bytes:
            self._unsent_bytes, self._unsent_since_s = unsent_bytes, now_s
        elif now_s - self._unsent_since_s > SEND_WINDOW_S:
            if self._unsent_bytes - unsent_bytes < SEND_WINDOW_BYTES:
                self.cut("send_timeout")
            self._unsent_bytes, self._unsent_since_s = unsent_bytes, now_s

    def _answer_and_close(self, error: ApiError) -> None:
        """Only where no answer has begun: one may be given before the request is whole."""
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(_raw(error))
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _note_phase(self) -> None:
        their_state = self.conn.their_state
        phase: Phase = "heard"
        if their_state is h11.SEND_BODY:
            phase = "body"
        elif their_state is h11.IDLE:
            has_begun = self.timeout_keep_alive_task is None or self.conn.trailing_data[0]
            phase = "head" if has_begun else "idle"
        if phase != self._phase:
            self._phase, self._since_s = phase, self.loop.time()
            self._connections.now_in(self, phase)


class _Lingering:
    """A transport that is not closed before its client has ended what it was sending, or `LINGER_S` have passed."""

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        self._transport, self._connection = transport, connection
        self._is_lingering = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._is_lingering or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing() or not self._connection.is_amid_request:
            self._transport.close()
            return
        self._is_lingering = True
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._transport.resume_reading()
        self._connection.loop.call_later(LINGER_S, self._transport.close)


class Door:
    """Accepts connections on `sock`; to uvicorn an `asyncio.Server`. It accepts no more than there is room for, so that
    descriptors never run out."""

    def __init__(
        self,
        sock: socket.socket,
        make: Callable[[], Connection],
        connections: Connections,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._sock, self._make, self._connections, self._tls = sock, make, connections, tls
        self._loop = asyncio.get_running_loop()
        self._is_open, self._is_listening = True, False
        self._connecting: set[asyncio.Task[Any]] = set()
        sock.setblocking(False)
        connections.on_room.append(self._listen)
        self._listen()

    def close(self) -> None:
        self._is_open = False
        self._pause()

    async def wait_closed(self) -> None:
        """At once: `close` has done it."""

    def _listen(self) -> None:
        if self._is_open and not self._is_listening:
            self._is_listening = True
            self._loop.add_reader(self._sock.fileno(), self._accept)

    def _pause(self) -> None:
        if self._is_listening:
            self._is_listening = False
            self._loop.remove_reader(self._sock.fileno())

    def _accept(self) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            is_full = self._connections.is_full
            if is_full and not self._connections.can_make_room:  # the next to end or to idle opens the door again
                self._pause()
                return
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:  # no descriptor or memory is left, in spite of all
                self._pause()
                self._loop.call_later(ACCEPT_PAUSE_S, self._listen)
                return
            if is_full:
                self._connections.make_room()
            self._connect(sock)

    def _connect(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a client's machine may vanish without a word
        connection = self._make()
        timeout_s = self._connections.limits.head_timeout_s
        handshake: dict[str, Any] = {} if self._tls is None else {"ssl": self._tls, "ssl_handshake_timeout": timeout_s}
        connecting = self._loop.create_task(self._connected(connection, sock, handshake))
        connection.connecting = connecting
        self._connecting.add(connecting)
        connecting.add_done_callback(self._connecting.discard)

    async def _connected(self, connection: Connection, sock: socket.socket, handshake: dict[str, Any]) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: connection, sock, **handshake)
        except (OSError, ConnectionError, asyncio.CancelledError):  # of the handshake
            self._connections.left(connection)
            sock.close()


def _raw(error: ApiError) -> bytes:
    """The answer as it goes over the wire, for where no application is asked."""
    response = error_response(error)
    lines = [f"HTTP/1.1 {error.status} ", "connection: close"]
    lines += [f"{name.decode()}: {value.decode()}" for name, value in response.raw_headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + bytes(response.body)
