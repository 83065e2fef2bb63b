from pathlib import Path

import pytest

from tetrion.engine.transport.available_memory import available_memory_bytes


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MACHINE = {"proc/meminfo": "MemTotal:  2000 kB\nMemAvailable:    1000 kB\nHugePages_Total:       0\n"}


def test_the_machine_alone(tmp_path: Path) -> None:
    assert available_memory_bytes(write(tmp_path, MACHINE)) == 1000 * 1024


def test_nothing_is_told(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path) is None


@pytest.mark.parametrize(("limit", "expected"), [("500000", 500000 - 300000 + 100000), ("max", 1000 * 1024)])
def test_control_group_v2(tmp_path: Path, limit: str, expected: int) -> None:
    group = "sys/fs/cgroup/a/b/"
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        group + "memory.max": limit + "\n",
        group + "memory.current": "300000\n",
        group + "memory.stat": "anon 5\ninactive_file 100000\n",
    }
    assert available_memory_bytes(write(tmp_path, MACHINE | files)) == expected


def test_an_ancestor_may_be_tighter(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/memory.max": "1000\n",
        "sys/fs/cgroup/a/memory.current": "400\n",
    }
    assert available_memory_bytes(write(tmp_path, MACHINE | files)) == 600


def test_control_group_v1_as_seen_from_a_container(tmp_path: Path) -> None:
    """The path named in /proc is the host's; inside, only the mount's root exists."""
    group = "sys/fs/cgroup/memory/"
    files = {
        "proc/self/cgroup": "8:pids:/x\n4:cpu,memory:/docker/123\n0::/\n",
        group + "memory.limit_in_bytes": "70000\n",
        group + "memory.usage_in_bytes": "50000\n",
        group + "memory.stat": "total_inactive_file 7\n",
    }
    assert available_memory_bytes(write(tmp_path, MACHINE | files)) == 20007


def test_use_above_the_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "10\n",
        "sys/fs/cgroup/memory.current": "11\n",
    }
    assert available_memory_bytes(write(tmp_path, MACHINE | files)) == 0
