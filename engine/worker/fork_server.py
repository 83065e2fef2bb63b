"""The process that CPU workers are forked from: it imports their libraries once, which takes seconds, then waits.

    engine   ForkServer ─── `ForkRequest`, descriptors ──▶ main ── fork ──▶ worker
             ForkedWorker ◀────── `Forked`, `Exited` ─────┘

Whatever fails on the way (no process, no descriptor), the status socket is closed without `Forked`, and there is no
worker. `Exited` is sent before the worker is reaped: until then its pid is nobody else's. The server ends with the
engine, or when the engine has no more use for it; its workers outlast it, and have the environment and the folder that
it was started with. Linux only. Not for GPU workers: see spare.py.
"""

import contextlib
import errno
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
from tetrion.engine.worker.handover import receive
from tetrion.engine.worker.spec import Exited, Forked, ForkRequest


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
        data, fds = receive(self._engine)
        try:
            if data:
                self._fork(msgspec.json.decode(data, type=ForkRequest), fds)
        except OSError:
            traceback.print_exc()
        finally:
            for fd in fds:
                os.close(fd)
        return bool(data)

    def _fork(self, request: ForkRequest, fds: list[int]) -> None:
        """Raises OSError; there is no worker then. `fds` are still the caller's."""
        if len(fds) != 1 + len(request.fds):
            raise OSError(errno.EMFILE, f"{len(fds)} of {1 + len(request.fds)} descriptors came, no more were free")
        with contextlib.ExitStack() as undo:
            status = undo.enter_context(socket.socket(fileno=os.dup(fds[0])))
            pid = os.fork()
            if pid == 0:
                self._become_worker(request, status, fds)
            undo.callback(kill_and_reap, pid)
            pidfd = os.pidfd_open(pid)
            undo.callback(os.close, pidfd)
            self._selector.register(pidfd, selectors.EVENT_READ)
            undo.callback(self._selector.unregister, pidfd)
            with contextlib.suppress(ConnectionError):  # the engine has gone: the worker will see it too
                status.send(msgspec.json.encode(Forked(pid=pid)))
            self._workers[pidfd] = (pid, status)
            undo.pop_all()

    def _reap(self, pidfd: int) -> None:
        self._selector.unregister(pidfd)
        pid, status = self._workers.pop(pidfd)
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        with contextlib.suppress(OSError):  # the engine has gone; or it learns no more than that the socket is closed
            status.send(msgspec.json.encode(Exited(code=code)))
        os.waitpid(pid, 0)
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
            os.close(fds[0])
            self._engine.close()
            move_descriptors(fds[1:], request.fds)
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


def kill_and_reap(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


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
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as some start the engine, workers could not be waited for
    gc.collect()
    gc.freeze()  # a collection writes to objects, and so would copy the pages that all workers share
    Server(socket.socket(fileno=int(sys.argv[1]))).serve()


if __name__ == "__main__":
    main()
