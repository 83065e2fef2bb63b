"""Workers that are forked from a process which has their libraries loaded: the engine's side of `fork_server`."""

import contextlib
import errno
import os
import select
import signal
import socket
import threading
import time
from typing import ClassVar

import msgspec

from tetrion.engine.executors.fleet.forks import abandon_in_children
from tetrion.engine.executors.fleet.process import how_it_ended, start_interpreter
from tetrion.engine.worker.spec import Exited, Forked, ForkRequest, WorkerSpec

SEND_TIMEOUT_S = 5.0
EXIT_TIMEOUT_S = 1.0
"""So long a worker that is gone waits for its exit status: its fork server may be stopped."""
MAX_STATUS_BYTES = 1024


class ForkServer:
    """The engine's end of `fork_server`. The engines of one process share one while they live: `acquire`, `release`."""

    _shared: ClassVar["ForkServer | None"] = None
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self) -> None:
        self._num_holders = 0
        self._owner = os.getpid()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(SEND_TIMEOUT_S)
        try:
            with theirs:
                fd = theirs.fileno()
                self._process = start_interpreter("tetrion.engine.worker.fork_server", str(fd), (fd,))
        except BaseException:
            self._socket.close()
            raise
        abandon_in_children(self)

    def abandon(self) -> None:
        """In a forked child, which has no use for it: it ends with the engine that it belongs to."""
        self._socket.close()
        ForkServer._lock = threading.Lock()
        ForkServer._shared = None

    @classmethod
    def acquire(cls) -> "ForkServer":
        """The one that others hold, or a new one. Raises OSError."""
        with cls._lock:
            shared = cls._shared
            if shared is None or not shared.is_running:
                shared = cls._shared = cls()
            shared._num_holders += 1
            return shared

    def release(self) -> None:
        """To be called once for each `acquire`. The server ends with its last holder; workers are not touched."""
        with self._lock:
            self._num_holders -= 1
            if self._num_holders > 0:
                return
            if ForkServer._shared is self:
                ForkServer._shared = None
        self._socket.close()
        self.kill()
        self._process.wait()

    @property
    def is_running(self) -> bool:
        """Whether it can still be asked; a process that was forked from its owner cannot."""
        return self._owner == os.getpid() and self._process.poll() is None

    def fork(self, spec: WorkerSpec, fds: tuple[int, ...], life_fd: int) -> "ForkedWorker":
        """Ask for a worker that inherits `fds`, and do not wait for it: it may turn out that there is none. `life_fd`:
        the read end of its life pipe, which stays open until it has ended. Raises OSError."""
        inherited = (*(fd for fd in (1, 2) if is_open(fd)), *fds)
        request = msgspec.json.encode(ForkRequest(spec=spec, fds=inherited))
        status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                with contextlib.suppress(ConnectionError):  # the server has just ended: the status socket says so
                    socket.send_fds(self._socket, [request], [theirs.fileno(), *inherited])
            except BaseException:
                status.close()
                raise
        return ForkedWorker(self, status, life_fd)

    def kill(self) -> None:
        """For a server that does not do as it is asked: whoever waits for a worker learns that there will be none."""
        self._process.kill()

    def how_it_ended(self) -> str | None:
        """None while it runs."""
        code = self._process.poll()
        return None if code is None else how_it_ended(code)


class ForkedWorker:
    """Not our child. What is known of it comes over the status socket: `Forked`, then `Exited`; end-of-file without
    them if the server could not fork, or died.

    From its launch on this takes no descriptor that it could not do without: a death must be seen when none is free.
    The pidfd is opened as soon as the worker says that it has started, by its pid, which is nobody else's then: the
    server says `Exited` *before* it reaps the worker, so as long as it has not, the pid is not free. (Opening first
    and looking at the socket afterwards leaves no gap.) If there is no descriptor for a pidfd, the worker is signalled
    by its pid, with the same argument, and its end is seen by its life pipe. That suffices: Linux takes a dying
    process's memory from each of its threads before it closes the files they share, so nothing it computed is stored
    after the pipe is closed.
    """

    def __init__(self, server: ForkServer, status: socket.socket, life_fd: int) -> None:
        """Internal: see `ForkServer.fork`."""
        self._server = server
        self._status = status
        self._life_fd = life_fd
        self._pid: int | None = None
        self._pidfd: int | None = None
        self._code: int | None = None
        self._is_cut_off = False
        """Whether nothing more will come over the status socket."""
        self._gone_s: float | None = None
        self._end: str | None = None

    @property
    def pid(self) -> int:
        assert self._pid is not None, "asked for before the worker has said that it runs"
        return self._pid

    @property
    def was_refused(self) -> bool:
        """Whether it has ended because its server, which runs, could not fork it."""
        return self._end is not None and self._pid is None and self._server.is_running

    def started(self, pid: int) -> None:
        """The worker says that it has started."""
        self._pid = pid
        self._listen()
        self._take_pidfd()

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def how_it_ended(self) -> str | None:
        if self._end is None:
            self._listen()
            if self._is_gone():
                self._end = self._verdict()
                if self._end is not None:
                    self._close()
        return self._end

    def _listen(self) -> None:
        """Take what has come over the status socket."""
        while not self._is_cut_off and is_readable(self._status.fileno()):
            try:
                data = self._status.recv(MAX_STATUS_BYTES)
            except ConnectionError:
                data = b""
            if not data:
                self._is_cut_off = True
                return
            match msgspec.json.decode(data, type=Forked | Exited):
                case Forked(pid=pid):
                    self._pid = pid
                case Exited(code=code):
                    self._code, self._is_cut_off = code, True

    def _take_pidfd(self) -> None:
        """Unless the worker is gone, or no descriptor is free."""
        if self._pidfd is None and self._pid is not None and self._code is None:
            with contextlib.suppress(OSError):
                self._pidfd = os.pidfd_open(self._pid)
            self._listen()
            if self._code is not None:
                self._drop_pidfd()  # it may have been reaped before: whose it is cannot be said

    def _signal(self, number: signal.Signals) -> None:
        if self._end is not None:
            return
        self._listen()
        self._take_pidfd()
        if self._pid is None and not self._is_cut_off:
            self._server.kill()
        elif self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)
        elif self._pid is not None and self._code is None and not is_readable(self._life_fd):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)

    def _is_gone(self) -> bool:
        """Whether the process is gone, or will never be."""
        if self._code is not None or (self._is_cut_off and self._pid is None):
            return True
        return is_readable(self._life_fd if self._pidfd is None else self._pidfd)

    def _verdict(self) -> str | None:
        """How a process that is gone has ended; None: it will be said in a moment."""
        if self._code is not None:
            return how_it_ended(self._code)
        server = self._server.how_it_ended()
        if self._is_cut_off and server is not None:
            return f"no exit status, its fork server {server}"
        now_s = time.monotonic()
        if self._gone_s is None:
            self._gone_s = now_s
        if now_s < self._gone_s + EXIT_TIMEOUT_S:
            return None
        return "could not be forked" if self._pid is None else "no exit status, its fork server does not answer"

    def _close(self) -> None:
        self._is_cut_off = True
        self._status.close()
        self._drop_pidfd()

    def _drop_pidfd(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None


def can_fork() -> bool:
    """Whether this system has pidfds."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except AttributeError:
        return False
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    return True


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def is_readable(fd: int) -> bool:
    """Whether there is something to read by now, be it the end of the file."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
