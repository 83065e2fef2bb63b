import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from benchmarks.soak.processes import MARK, Family, cpu_s, figures_of, shared_memory_mb

WORKER = "import sys; print(flush=True); sys.stdin.read()  # tetrion.engine.worker"


def start(mark: str, code: str = WORKER) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {MARK: mark}
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.fixture
def ours() -> Iterator[subprocess.Popen[bytes]]:
    with start("ours") as process:
        yield process
        process.kill()


def test_only_marked_processes_are_known_and_signalled(ours: subprocess.Popen[bytes]) -> None:
    family = Family(os.getpid(), "ours")
    with start("theirs") as stranger:
        assert family.workers() == [ours.pid]
        assert not family.signal(stranger.pid, signal.SIGKILL) and stranger.poll() is None
        stranger.kill()
    assert family.signal(ours.pid, signal.SIGKILL)
    ours.wait()
    assert family.workers() == [] and not family.signal(ours.pid, signal.SIGKILL)


def test_figures_are_those_of_the_process(ours: subprocess.Popen[bytes]) -> None:
    (held,) = Family(os.getpid(), "ours").figures()["worker"]
    assert held.private_mb > 1 and held.threads == 1 and held.descriptors >= 3
    assert cpu_s(ours.pid) >= 0 and shared_memory_mb() >= 0
    ours.kill()
    ours.wait()
    assert figures_of(ours.pid) is None and cpu_s(ours.pid) == 0


def test_the_engine_itself_is_no_worker(ours: subprocess.Popen[bytes]) -> None:
    assert Family(ours.pid, "ours").roles() == {ours.pid: "engine"}
