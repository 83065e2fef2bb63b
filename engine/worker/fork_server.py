"""The process that CPU workers are forked from: it imports their libraries once, which takes seconds, then waits.

    engine   ForkServer ─── `ForkRequest`, descriptors ──▶ main ── fork ──▶ worker
             ForkedWorker ◀── `Forked`, pidfd; `Exited` ──┘

It ends with the engine, or when the engine has no more use for it; its workers outlast it, and have the environment
and the folder that it was started with. Linux only. Not for GPU workers: a library that touches CUDA while it is
imported would spoil CUDA for every fork.
"""

import contextlib
import fcntl
import gc
import os
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import msgspec

import tetrion.engine.worker.cpu  # noqa: F401  what a CPU worker imports, but for its model's family
from tetrion.engine.models.registry import import_families
from tetrion.engine.worker.entry import run
from tetrion.engine.worker.spec import Exited, Forked, ForkRequest

MAX_REQUEST_BYTES = 1 << 18
MAX_FDS = 253
"""What Linux lets one message carry."""


class Server:
    def __init__(self, engine: socket.socket) -> None:
        self._engine = engine
        self._selector = selectors.DefaultSelector()
        self._selector.register(engine, selectors.EVENT_READ)
        self._workers: dict[int, tuple[int, socket.socket]] = {}
        """By pidfd: pid, status socket."""

    def serve(self) -> None:
        """Fork and reap until the engine has gone."""
        while True:
            for key, _ in self._selector.select():
                if key.fd != self._engine.fileno():
                    self._reap(key.fd)
                elif not self._receive():
                    return

    def _receive(self) -> bool:
        data, fds, _, _ = socket.recv_fds(self._engine, MAX_REQUEST_BYTES, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        if data:
            self._fork(msgspec.json.decode(data, type=ForkRequest), socket.socket(fileno=fds[0]), fds[1:])
        for fd in fds[1:]:
            os.close(fd)
        return bool(data)

    def _fork(self, request: ForkRequest, status: socket.socket, fds: list[int]) -> None:
        try:
            pid = os.fork()
        except OSError:  # too many processes: the closed socket says that there is no worker
            traceback.print_exc()
            status.close()
            return
        if pid == 0:
            self._become_worker(request, status, fds)
        pidfd = os.pidfd_open(pid)
        with contextlib.suppress(ConnectionError):  # the engine has gone: the worker will see it too
            socket.send_fds(status, [msgspec.json.encode(Forked(pid=pid))], [pidfd])
        self._workers[pidfd] = (pid, status)
        self._selector.register(pidfd, selectors.EVENT_READ)

    def _reap(self, pidfd: int) -> None:
        self._selector.unregister(pidfd)
        pid, status = self._workers.pop(pidfd)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(ConnectionError):
            status.send(msgspec.json.encode(Exited(code=code)))
        status.close()
        os.close(pidfd)

    def _become_worker(self, request: ForkRequest, status: socket.socket, fds: list[int]) -> NoReturn:
        code = 1
        try:
            self._selector.close()
            for pidfd, (_, sibling) in self._workers.items():
                os.close(pidfd)
                sibling.close()
            status.close()
            self._engine.close()
            move_descriptors(fds, request.fds)
            os.setpgid(0, 0)  # of its own: Ctrl-C in a terminal reaches the engine alone, which then ends its workers
            run(request.spec)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)  # without what the server would do at its own end


def move_descriptors(fds: Sequence[int], numbers: Sequence[int]) -> None:
    """Give the open file of each of `fds` the descriptor of that number, whatever this was; `fds` are closed."""
    free = max(numbers, default=0) + 1
    parked = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, free) for fd in fds]
    for fd in fds:
        os.close(fd)
    for fd, number in zip(parked, numbers, strict=True):
        os.dup2(fd, number)
        os.close(fd)


def main() -> None:
    import_families()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()  # a collection writes to objects, and so would copy the pages that all workers share
    Server(socket.socket(fileno=int(sys.argv[1]))).serve()


if __name__ == "__main__":
    main()
