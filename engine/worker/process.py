"""The engine's handle on one worker process: see it die, end it. Here of one that has an interpreter of its own.

A worker ends in four ways: it is told to (`Shutdown`), it sees the engine's life pipe close, it is terminated, it is
killed. However it ends, its own life pipe closes, by which the engine notices at once.
"""

import os
import subprocess
import sys
from typing import Protocol

import msgspec

from tetrion.engine.worker.reproducible import gemm_environment
from tetrion.engine.worker.spec import WorkerSpec

TERMINATE_AFTER_S = 5.0
KILL_AFTER_S = 2.0


class WorkerProcess(Protocol):
    @property
    def pid(self) -> int: ...

    def kill(self) -> None: ...

    def end(self) -> str:
        """Wait for a worker that was told to shut down or has closed its life pipe; terminate, then kill, one that
        does not go. Returns how it ended, for people: it computes and stores nothing any more. Blocks.
        """


class SpawnedWorker:
    def __init__(self, spec: WorkerSpec, fds: tuple[int, ...]) -> None:
        """Start the worker."""
        num_threads = str(spec.num_threads)
        threads = {"OMP_NUM_THREADS": num_threads, "MKL_NUM_THREADS": num_threads}
        # A process group of its own: Ctrl-C in a terminal reaches the engine alone, which then ends its workers.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tetrion.engine.worker", msgspec.json.encode(spec).decode()],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            env=os.environ | gemm_environment() | threads,
            process_group=0,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> str:
        for timeout_s, stronger in ((TERMINATE_AFTER_S, self._process.terminate), (KILL_AFTER_S, self._process.kill)):
            try:
                self._process.wait(timeout_s)
                break
            except subprocess.TimeoutExpired:
                stronger()
        return how_it_ended(self._process.wait())


def how_it_ended(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exited with status {code}"
