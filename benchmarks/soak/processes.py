"""The processes of one server and what they hold, as /proc tells it. Signals go to marked processes only.

Every process of a server inherits a mark in its environment, by which workers are known after their fork server has
died, too, and a process that has taken over a number is not mistaken for one of ours.
"""

import os
import re
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

MARK = "TETRION_SOAK_MARK"


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What a process holds. Memory in MB: private and shared."""

    private_mb: float
    shared_mb: float
    descriptors: int
    threads: int


class Family:
    """The engine `pid` and its descendants, whose environment has `mark`."""

    def __init__(self, pid: int, mark: str) -> None:
        self.pid = pid
        self._mark = f"{MARK}={mark}\0".encode()

    def roles(self) -> dict[int, str]:
        """engine, fork server or worker, by process number; no zombies."""
        found = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit() and (role := self._role(int(entry))):
                found[int(entry)] = role
        return found

    def workers(self) -> list[int]:
        return sorted(pid for pid, role in self.roles().items() if role == "worker")

    def signal(self, pid: int, signum: signal.Signals) -> bool:
        """Whether there was still such a process of this server."""
        if self._role(pid) is None:
            return False
        with suppress(ProcessLookupError):
            os.kill(pid, signum)
            return True
        return False

    def figures(self) -> dict[str, list[Figures]]:
        """By role, one for each process."""
        by_role: dict[str, list[Figures]] = {}
        for pid, role in self.roles().items():
            if held := figures_of(pid):
                by_role.setdefault(role, []).append(held)
        return by_role

    def _role(self, pid: int) -> str | None:
        try:
            folder = Path(f"/proc/{pid}")
            if self._mark not in (folder / "environ").read_bytes():
                return None
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (folder / "cmdline").read_bytes()
        except OSError:
            return None
        if state == "Z":
            return None
        if pid == self.pid:
            return "engine"
        if b"tetrion.engine.worker" not in command:
            return None
        return "fork server" if b"fork_server" in command and int(parent) == self.pid else "worker"


def figures_of(pid: int) -> Figures | None:
    """None if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None
    values = dict(re.findall(r"^(RssAnon|RssShmem|Threads):\s+(\d+)", status, re.MULTILINE))
    if "RssAnon" not in values:
        return None
    return Figures(
        private_mb=int(values["RssAnon"]) / 1024,
        shared_mb=int(values["RssShmem"]) / 1024,
        descriptors=descriptors,
        threads=int(values["Threads"]),
    )


def add_up(held: Sequence[Figures]) -> Figures:
    return Figures(**{name: sum(getattr(one, name) for one in held) for name in Figures.__struct_fields__})


def cpu_s(pid: int) -> float:
    """CPU time that the process has used; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def shared_memory_mb() -> float:
    """Of the whole machine."""
    found = re.search(r"^Shmem:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0
