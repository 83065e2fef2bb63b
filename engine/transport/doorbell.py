"""A wake-up between two processes: one rings, the other sleeps on a file descriptor.

Owns one eventfd, or a pipe where there is none; knows nothing of rings. Rings add up to one: a doorbell says that
something happened since the last `clear`, not how often.
"""

import os
from contextlib import suppress
from typing import Literal, Self

DoorbellKind = Literal["auto", "eventfd", "pipe"]

_ONE = (1).to_bytes(8, "little")
_DRAIN_BYTES = 512


class Doorbell:
    """`fileno()` is readable from the first `ring()` until `clear()`. Nothing blocks; either process may close."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        """Internal: owns both descriptors (the same one twice for an eventfd). Use `create` or `attach`."""
        self._read_fd = read_fd
        self._write_fd = write_fd

    @classmethod
    def create(cls, kind: DoorbellKind = "auto") -> Self:
        if kind == "auto":
            kind = "eventfd" if hasattr(os, "eventfd") else "pipe"
        if kind == "eventfd":
            fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            return cls(fd, fd)
        read_fd, write_fd = os.pipe()
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)
        return cls(read_fd, write_fd)

    @classmethod
    def attach(cls, read_fd: int, write_fd: int) -> Self:
        """The same doorbell in another process, which inherited both descriptors and owns them from here on."""
        for fd in {read_fd, write_fd}:
            os.set_inheritable(fd, False)
        return cls(read_fd, write_fd)

    @property
    def fds(self) -> tuple[int, int]:
        """(read end, write end), to pass on."""
        return self._read_fd, self._write_fd

    def fileno(self) -> int:
        """The descriptor to wait on, with `loop.add_reader` or `select.poll`."""
        return self._read_fd

    def ring(self) -> None:
        """Make `fileno()` readable. Eight bytes at a time, so a full pipe or counter means: already ringing."""
        with suppress(BlockingIOError):
            os.write(self._write_fd, _ONE)

    def clear(self) -> None:
        """Forget all rings so far."""
        with suppress(BlockingIOError):
            while len(os.read(self._read_fd, _DRAIN_BYTES)) == _DRAIN_BYTES:  # an eventfd gives 8 bytes, once
                pass

    def close(self) -> None:
        for fd in {self._read_fd, self._write_fd} - {-1}:
            os.close(fd)
        self._read_fd = self._write_fd = -1
