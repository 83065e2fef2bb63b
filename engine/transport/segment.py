"""Shared memory without a name: it goes when the last process that holds it goes, however that process ends.

Owns creation, reservation and mapping of the bytes; does not know what lies in them. A segment is passed on as an
open file descriptor (`subprocess.Popen(..., pass_fds=[segment.fd])`), so there is nothing to unlink and no tracker.
"""

import mmap
import os
import shutil
import tempfile
from math import prod
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from tetrion.engine.transport.available_memory import available_memory_bytes

Backing = Literal["auto", "memfd", "file"]
"""`memfd`: anonymous memory (Linux). `file`: an unlinked temporary file. `auto`: memfd where there is one."""

_ZEROS_BYTES = 1 << 20


class SharedMemoryError(OSError):
    """There is no room for a segment. `available_bytes` is None where the system does not tell."""

    def __init__(self, name: str, wanted_bytes: int, available_bytes: int | None, reason: str) -> None:
        available = "an unknown number of" if available_bytes is None else f"{available_bytes:,}"
        super().__init__(
            f"shared memory {name!r}: wanted {wanted_bytes:,} bytes, {available} bytes are available ({reason})"
        )
        self.wanted_bytes = wanted_bytes
        self.available_bytes = available_bytes


class SharedSegment:
    """`num_bytes` of zeroed memory that several processes map. Owns its descriptor and its mapping.

    The descriptor is close-on-exec: only `pass_fds` hands it to a child.
    """

    def __init__(self, fd: int, num_bytes: int) -> None:
        """Internal: maps `fd` and owns it. Use `create` or `attach`."""
        self._view = memoryview(mmap.mmap(fd, num_bytes))
        self._fd = fd
        self.num_bytes = num_bytes

    @classmethod
    def create(cls, name: str, num_bytes: int, *, backing: Backing = "auto") -> Self:
        """A new segment, all of it reserved. `name` shows up in errors and in /proc/PID/fd, nowhere else.

        Raises SharedMemoryError when memory (or, for a file, disk space) does not suffice, ValueError if
        `num_bytes` < 1.
        """
        if num_bytes < 1:
            raise ValueError(f"shared memory {name!r}: num_bytes must be at least 1, got {num_bytes}")
        available = _available_bytes(backing)
        if available is not None and num_bytes > available:
            raise SharedMemoryError(name, num_bytes, available, "checked before reserving")
        fd = open_anonymous_file(name, backing)
        try:
            reserve(fd, num_bytes)
            return cls(fd, num_bytes)
        except OSError as error:
            os.close(fd)
            raise SharedMemoryError(name, num_bytes, available, error.strerror or str(error)) from error

    @classmethod
    def attach(cls, fd: int, num_bytes: int) -> Self:
        """Map a segment that another process created; from here on this object owns `fd`.

        Raises ValueError if what `fd` refers to is shorter than `num_bytes`, OSError if `fd` is not open.
        """
        size = os.fstat(fd).st_size
        if not 1 <= num_bytes <= size:
            raise ValueError(f"shared memory fd {fd}: expected {num_bytes:,} bytes, it has {size:,}")
        os.set_inheritable(fd, False)
        return cls(fd, num_bytes)

    @property
    def fd(self) -> int:
        """The descriptor to pass on; -1 after `close`."""
        return self._fd

    @property
    def view(self) -> memoryview:
        """All bytes, writable; empty after `close`."""
        return self._view

    def array(self, dtype: npt.DTypeLike, shape: tuple[int, ...], offset_bytes: int = 0) -> npt.NDArray[Any]:
        """A writable array over part of the segment, without a copy. Raises ValueError if it does not fit."""
        wanted = prod(shape) * np.dtype(dtype).itemsize
        if offset_bytes < 0 or min(shape, default=0) < 0 or offset_bytes + wanted > self.num_bytes:
            raise ValueError(f"{wanted:,} bytes at offset {offset_bytes:,} do not fit in {self.num_bytes:,} bytes")
        return np.frombuffer(self._view, np.uint8, wanted, offset_bytes).view(dtype).reshape(shape)

    def close(self) -> None:
        """Give up descriptor and mapping. Whatever was made from `view` or `array` keeps the mapping while it lives."""
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        # Only let go, never `mmap.close()`: torch.frombuffer and np.ndarray(buffer=…) refer to the mapping without
        # holding an export of it, so an explicit close would succeed and leave them pointing at unmapped memory.
        self._view = memoryview(b"")


def open_anonymous_file(name: str, backing: Backing = "auto") -> int:
    """A close-on-exec descriptor, owned by the caller, of an empty file in memory that no folder lists.

    For content whose size is not known yet; `SharedSegment.create` also reserves. `backing="file"`, or a system
    without memfd, gives an unlinked temporary file instead.
    """
    if _is_memfd(backing):
        return os.memfd_create(f"tetrion-{name}", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile(prefix="tetrion-") as file:
        return os.dup(file.fileno())


def _is_memfd(backing: Backing) -> bool:
    return backing == "memfd" or (backing == "auto" and hasattr(os, "memfd_create"))


def _available_bytes(backing: Backing) -> int | None:
    return available_memory_bytes() if _is_memfd(backing) else shutil.disk_usage(tempfile.gettempdir()).free


def reserve(fd: int, num_bytes: int) -> None:
    """Size `fd` and back every page of it: lack of memory is an OSError here instead of a SIGBUS at first touch."""
    os.ftruncate(fd, num_bytes)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, num_bytes)
        return
    zeros, offset = bytes(_ZEROS_BYTES), 0
    while offset < num_bytes:
        offset += os.pwrite(fd, zeros[: num_bytes - offset], offset)
