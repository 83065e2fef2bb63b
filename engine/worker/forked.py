"""Workers that are forked from a process which has their libraries loaded: the engine's side of `fork_server`."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from typing import ClassVar

import msgspec

from tetrion.engine.worker.process import KILL_AFTER_S, TERMINATE_AFTER_S, how_it_ended
from tetrion.engine.worker.reproducible import gemm_environment
from tetrion.engine.worker.spec import Exited, Forked, ForkRequest, WorkerSpec

SEND_TIMEOUT_S = 5.0
EXIT_TIMEOUT_S = 1.0
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
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tetrion.engine.worker.fork_server", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | gemm_environment(),
                process_group=0,
            )

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

    def fork(self, spec: WorkerSpec, fds: tuple[int, ...]) -> "ForkedWorker":
        """Ask for a worker that inherits `fds`, and do not wait for it: it may turn out that there is none. Raises
        OSError."""
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
        return ForkedWorker(self, status)

    def kill(self) -> None:
        """For a server that does not do as it is asked: whoever waits for a worker learns that there will be none."""
        self._process.kill()

    def how_it_ended(self) -> str | None:
        """None if it runs, also a moment from now."""
        try:
            return how_it_ended(self._process.wait(EXIT_TIMEOUT_S))
        except subprocess.TimeoutExpired:
            return None


class ForkedWorker:
    """Not our child: known by its pidfd, which comes over the status socket once it has been forked."""

    def __init__(self, server: ForkServer, status: socket.socket) -> None:
        """Internal: see `ForkServer.fork`."""
        self._server = server
        self._status = status
        self._lock = threading.Lock()
        self._pid: int | None = None
        self._pidfd: int | None = None
        self._is_gone = False

    @property
    def pid(self) -> int:
        self._learn()
        assert self._pid is not None, "asked for before the worker has said that it runs"
        return self._pid

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def end(self) -> str:
        for timeout_s, stronger in ((TERMINATE_AFTER_S, signal.SIGTERM), (KILL_AFTER_S, signal.SIGKILL)):
            if self._wait(timeout_s):
                break
            self._signal(stronger)
        self._wait(None)
        code = self._exit_code()
        with self._lock:
            self._is_gone = True
            self._status.close()
            if self._pidfd is not None:
                os.close(self._pidfd)
        if code is not None:
            return how_it_ended(code)
        server = self._server.how_it_ended()
        return "could not be forked" if server is None else f"no exit status, its fork server {server}"

    def _signal(self, number: signal.Signals) -> None:
        self._learn()
        with self._lock:
            if self._is_gone:
                return
            if self._pidfd is None:
                self._server.kill()
                return
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _learn(self) -> None:
        """Take the first message if it has come."""
        with self._lock:
            if self._pidfd is None and not self._is_gone and is_readable(self._status.fileno(), 0.0):
                data, fds, _, _ = socket.recv_fds(self._status, MAX_STATUS_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
                if data:
                    forked = msgspec.json.decode(data, type=Forked)
                    self._pid, self._pidfd = forked.pid, fds[0]
                else:
                    self._is_gone = True

    def _wait(self, timeout_s: float | None) -> bool:
        """Whether the process is gone, or will never be."""
        if self._pidfd is None:
            if not is_readable(self._status.fileno(), timeout_s):
                return False
            self._learn()
        return self._pidfd is None or is_readable(self._pidfd, timeout_s)

    def _exit_code(self) -> int | None:
        """Of a process that is gone; None if the server died before it could say."""
        if self._pidfd is None:
            return None
        with contextlib.suppress(ConnectionError):
            if data := self._status.recv(MAX_STATUS_BYTES):
                return msgspec.json.decode(data, type=Exited).code
        return None


def can_fork() -> bool:
    """Whether this system has pidfds."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def is_readable(fd: int, timeout_s: float | None) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))
