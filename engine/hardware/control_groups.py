"""This process's Linux control groups, version 1 and 2, and the processors that they leave it.

`root` lets tests give a made-up file tree. No torch.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple


class Group(NamedTuple):
    folder: Path
    version: Literal[1, 2]


def own_groups(controller: str, root: Path = Path("/")) -> Iterator[Group]:
    """This process's group of that controller and all above it, as far as they can be seen from here (a container sees
    its own as the topmost one). Nothing where there are none."""
    for line in text_of(root / "proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        if not names:
            yield from (Group(folder, 2) for folder in _upwards(root / "sys/fs/cgroup", path))
        elif controller in names.split(","):
            mounts = dict.fromkeys((root / "sys/fs/cgroup" / controller, root / "sys/fs/cgroup" / names))
            mount = next((mount for mount in mounts if mount.is_dir()), root / "sys/fs/cgroup" / controller)
            yield from (Group(folder, 1) for folder in _upwards(mount, path))


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    group = mount / path.lstrip("/")
    return (folder for folder in (group, *group.parents) if folder.is_relative_to(mount))


def text_of(path: Path) -> str:
    """Empty where it cannot be read."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def available_cpus(root: Path = Path("/")) -> int:
    """How many processors this process may use: those of its affinity, fewer if a quota leaves it less time (half a
    processor counts as one)."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *(math.ceil(quota) for quota in _cpu_quotas(root))]))


def _cpu_quotas(root: Path) -> Iterator[float]:
    """In processors, of each group that has one."""
    for folder, version in own_groups("cpu", root):
        if version == 2:
            given = text_of(folder / "cpu.max").split()
        else:
            given = (text_of(folder / "cpu.cfs_quota_us") + " " + text_of(folder / "cpu.cfs_period_us")).split()
        if len(given) == 2 and all(number.isdecimal() for number in given):  # "max", "-1": no quota
            quota_us, period_us = map(int, given)
            if quota_us and period_us:
                yield quota_us / period_us
