"""How much memory this process may still take: the machine's and its control groups' (v1 and v2) least.

Owns the reading of /proc and /sys; knows nothing of segments. `root` lets tests give a made-up file tree.
"""

from collections.abc import Iterator
from pathlib import Path

from tetrion.engine.hardware.control_groups import own_groups, text_of

FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
"""By version of control groups: where limit and use are, and what the reclaimable cache is called in memory.stat."""


def available_memory_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that can be taken without swapping or hitting a control-group limit; None where the system tells neither.

    Reclaimable page cache counts as available: `MemAvailable`, and `inactive_file` within a control group.
    """
    figures = list(_control_group_headrooms(root))
    if (machine := _mem_available(root / "proc/meminfo")) is not None:
        figures.append(machine)
    return max(0, min(figures)) if figures else None


def _mem_available(meminfo: Path) -> int | None:
    kibibytes = _table(meminfo).get("MemAvailable:")
    return None if kibibytes is None else kibibytes * 1024


def _control_group_headrooms(root: Path) -> Iterator[int]:
    """Limit minus use for this process's memory group and each of its ancestors that can be read."""
    for folder, version in own_groups("memory", root):
        if (headroom := _headroom(folder, *FILES[version])) is not None:
            yield headroom


def _headroom(folder: Path, limit_name: str, used_name: str, cache_name: str) -> int | None:
    limit, used = text_of(folder / limit_name).strip(), text_of(folder / used_name).strip()
    if not (limit.isdecimal() and used.isdecimal()):  # "max", or no such group
        return None
    return int(limit) - int(used) + _table(folder / "memory.stat").get(cache_name, 0)


def _table(path: Path) -> dict[str, int]:
    """Lines of `name number …`, as in /proc/meminfo and memory.stat."""
    rows = (line.split() for line in text_of(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdecimal()}
