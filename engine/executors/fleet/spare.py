"""The process that stands by to become a GPU worker: the engine's side of worker/spare.py."""

import logging
import socket

import msgspec

from tetrion.engine.executors.fleet.forks import abandon_in_children
from tetrion.engine.executors.fleet.process import SpawnedWorker, start_interpreter
from tetrion.engine.worker.spec import ForkRequest, WorkerSpec

logger = logging.getLogger(__name__)


class Spare:
    """One process that waits, or still imports: what it is asked for meanwhile it finds when it is ready."""

    def __init__(self, num_threads: int) -> None:
        """Raises OSError."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        try:
            with theirs:
                fd = theirs.fileno()
                self._process = start_interpreter("tetrion.engine.worker.spare", str(fd), (fd,), num_threads)
        except BaseException:
            self._socket.close()
            raise
        abandon_in_children(self)

    def abandon(self) -> None:
        """In a forked child, which has no use for it: it ends with the engine that it belongs to."""
        self._socket.close()

    def become(self, spec: WorkerSpec, fds: tuple[int, ...]) -> SpawnedWorker | None:
        """The worker; None if it has died meanwhile, or cannot be reached."""
        request = msgspec.json.encode(ForkRequest(spec=spec, fds=fds))
        try:
            if self._process.poll() is None:
                socket.send_fds(self._socket, [request], fds)
                return SpawnedWorker(self._process)
        except OSError as error:
            logger.warning("the spare worker cannot be reached: %s", error)
        self.close()
        return None

    def release(self) -> None:
        """It is a worker now."""
        self._socket.close()

    def close(self) -> None:
        """End it."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


class Spares:
    """One spare at a time, for workers that have as many threads as the last one."""

    def __init__(self) -> None:
        self._spare: Spare | None = None

    def launch(self, spec: WorkerSpec, fds: tuple[int, ...]) -> SpawnedWorker:
        """Start a worker, at best as the spare, in whose place another is started. Raises OSError."""
        spare, self._spare = self._spare, None
        worker = None if spare is None else spare.become(spec, fds)
        if worker is not None and spare is not None:
            spare.release()
        worker = worker or SpawnedWorker.start(spec, fds)
        try:
            self._spare = Spare(spec.num_threads)
        except OSError as error:
            logger.warning("no spare worker: %s", error)
        return worker

    def close(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.close()
