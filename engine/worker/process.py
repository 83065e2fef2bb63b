"""The engine's handle on one worker process: start it, see it die, end it.

A worker ends in four ways: it is told to (`Shutdown`), it sees the engine's life pipe close, it is terminated, it is
killed. However it ends, its own life pipe closes, which makes `life_fd` readable here at once.
"""

import os
import subprocess
import sys

import msgspec

from tetrion.engine.worker.spec import WorkerSpec

TERMINATE_AFTER_S = 5.0
KILL_AFTER_S = 2.0


class WorkerProcess:
    def __init__(self, spec: WorkerSpec, pass_fds: tuple[int, ...], life_fd: int) -> None:
        """Start the worker. `life_fd`: our end of its life pipe, owned from here on."""
        self.device_id = spec.device.device_id
        self.life_fd = life_fd
        environment = os.environ | {"OMP_NUM_THREADS": str(spec.num_threads), "MKL_NUM_THREADS": str(spec.num_threads)}
        # A process group of its own: Ctrl-C in a terminal reaches the engine alone, which then ends its workers.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tetrion.engine.worker", msgspec.json.encode(spec).decode()],
            pass_fds=pass_fds,
            stdin=subprocess.DEVNULL,
            env=environment,
            process_group=0,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def describe_end(self) -> str:
        """Why the worker is gone, for people. Call it only once `life_fd` has reached its end."""
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "it closed its life pipe"
        return f"killed by signal {-code}" if code < 0 else f"exited with status {code}"

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        """Wait for a worker that was told to shut down; terminate, then kill, one that does not. Blocks."""
        for timeout_s, stronger in ((TERMINATE_AFTER_S, self._process.terminate), (KILL_AFTER_S, self._process.kill)):
            try:
                self._process.wait(timeout_s)
                break
            except subprocess.TimeoutExpired:
                stronger()
        self._process.wait()
        os.close(self.life_fd)
