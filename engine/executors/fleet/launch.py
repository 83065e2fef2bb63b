"""How the workers of an engine are started."""

from tetrion.engine.executors.fleet.forked import ForkServer, can_fork
from tetrion.engine.executors.fleet.process import WorkerProcess
from tetrion.engine.executors.fleet.spare import Spares
from tetrion.engine.worker.spec import WorkerSpec


class Launcher:
    """Forks workers from a process that has their libraries loaded. Where that cannot be (GPUs; a system without
    pidfds) each gets an interpreter of its own, and one stands by with its libraries loaded."""

    def __init__(self, kind: str) -> None:
        self._forks = kind == "cpu" and can_fork()
        self._server: ForkServer | None = None
        self._spares = Spares()

    def launch(self, spec: WorkerSpec, fds: tuple[int, ...], life_fd: int) -> WorkerProcess:
        """Start a worker that inherits `fds`. `life_fd`: the read end of its life pipe. Raises OSError; nothing is
        left then."""
        if not self._forks:
            return self._spares.launch(spec, fds)
        if self._server is None or not self._server.is_running:
            self.close()
            self._server = ForkServer.acquire()
        return self._server.fork(spec, fds, life_fd)

    def close(self) -> None:
        """Start no more workers."""
        self._spares.close()
        if self._server is not None:
            self._server.release()
            self._server = None
