"""The engine's handle on one worker process: see it die, end it. Here of one that has an interpreter of its own.

A worker ends in four ways: it is told to (`Shutdown`), it sees the engine's life pipe close, it is terminated, it is
killed. However it ends, its own life pipe closes, by which the engine notices at once.
"""

import os
import subprocess
import sys
from typing import Protocol

import msgspec

from tetrion.engine.executors.fleet.reproducible import gemm_environment
from tetrion.engine.worker.spec import WorkerSpec


class WorkerProcess(Protocol):
    """Nothing here blocks, needs a thread, or takes a descriptor that it could not do without: a death must be seen
    when the machine has nothing to spare. Everything may raise OSError, and may be tried again."""

    @property
    def pid(self) -> int: ...

    @property
    def was_refused(self) -> bool:
        """Whether there has never been such a process, because the machine had no room for one just then."""

    def started(self, pid: int) -> None:
        """The worker says that it has started."""

    def terminate(self) -> None: ...

    def kill(self) -> None: ...

    def how_it_ended(self) -> str | None:
        """For people: it computes and stores nothing any more. None while that cannot be said."""


def start_interpreter(
    module: str, argument: str, fds: tuple[int, ...], num_threads: int | None = None
) -> subprocess.Popen[bytes]:
    """In a process group of its own: Ctrl-C in a terminal reaches the engine alone, which then ends its workers.
    `num_threads`: None leaves them to the process. Raises OSError."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(num_threads)) if num_threads else {}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, argument],
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
        env=os.environ | gemm_environment() | threads,
        process_group=0,
    )


class SpawnedWorker:
    """In an interpreter of its own; `process` is our child."""

    was_refused = False

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @classmethod
    def start(cls, spec: WorkerSpec, fds: tuple[int, ...]) -> "SpawnedWorker":
        argument = msgspec.json.encode(spec).decode()
        return cls(start_interpreter("tetrion.engine.worker", argument, fds, spec.num_threads))

    @property
    def pid(self) -> int:
        return self._process.pid

    def started(self, pid: int) -> None:
        """It is our child: its pid is known, and nobody else's until we have reaped it."""

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def how_it_ended(self) -> str | None:
        code = self._process.poll()
        return None if code is None else how_it_ended(code)


def how_it_ended(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exited with status {code}"
