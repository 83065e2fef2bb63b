import os
from pathlib import Path

import pytest

from tests.engine.transport.test_available_memory import write
from tetrion.engine.config import EngineConfig, threads_per_worker
from tetrion.engine.hardware import control_groups
from tetrion.engine.hardware.control_groups import available_cpus

V2 = {"proc/self/cgroup": "0::/a/b\n"}
V1 = {"proc/self/cgroup": "4:memory:/a\n3:cpu,cpuacct:/a/b\n2:cpuset:/\n"}
CPU = "sys/fs/cgroup/cpu/"


def v1(folder: str, quota_us: int, period_us: int = 100_000) -> dict[str, str]:
    return {f"{folder}cpu.cfs_quota_us": f"{quota_us}\n", f"{folder}cpu.cfs_period_us": f"{period_us}\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 16),
        (V2, 16),
        (V2 | {"sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 16),
        (V2 | {"sys/fs/cgroup/a/b/cpu.max": "50000 100000\n"}, 1),
        (V2 | {"sys/fs/cgroup/a/b/cpu.max": "150000 100000\n"}, 2),
        (V2 | {"sys/fs/cgroup/a/b/cpu.max": "400000 50000\n"}, 8),
        (V2 | {"sys/fs/cgroup/a/b/cpu.max": "9900000 100000\n"}, 16),
        (V2 | {"sys/fs/cgroup/a/b/cpu.max": "max 100000\n", "sys/fs/cgroup/a/cpu.max": "250000 100000\n"}, 3),
        (V2 | {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),  # a container sees its own as the topmost
        (V2 | {"sys/fs/cgroup/a/b/cpu.max": "nonsense\n"}, 16),
        (V1 | v1(CPU + "a/b/", -1), 16),
        (V1 | v1(CPU + "a/b/", 50_000), 1),
        (V1 | v1(CPU + "a/b/", -1) | v1(CPU + "a/", 320_000), 4),
        (V1 | v1("sys/fs/cgroup/cpu,cpuacct/a/b/", 200_000), 2),
        (V1 | v1(CPU, 300_000), 3),
        (V1 | v1(CPU + "a/b/", 0, 0), 16),
        ({"proc/self/cgroup": "5:memory:/\n1:name=systemd:/x\n0::/\n", "sys/fs/cgroup/cpu.max": "1000 100000"}, 1),
    ],
)
def test_a_quota_takes_processors_away(
    tmp_path: Path, files: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(16))
    assert available_cpus(write(tmp_path, files)) == expected


def test_workers_divide_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tetrion.engine.config.available_cpus", lambda: 5)
    config = EngineConfig()
    assert [threads_per_worker(config, num) for num in (1, 2, 5, 8)] == [5, 2, 1, 1]
    assert threads_per_worker(EngineConfig(num_threads=7), 2) == 7


def test_the_real_one_is_at_most_the_affinity() -> None:
    assert 1 <= control_groups.available_cpus() <= len(os.sched_getaffinity(0))
