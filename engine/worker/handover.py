"""How a process becomes a worker that was started before it was known which: what it is told, and its descriptors."""

import fcntl
import os
import socket
from collections.abc import Sequence

MAX_REQUEST_BYTES = 1 << 18
MAX_FDS = 253
"""What Linux lets one message carry."""


def receive(engine: socket.socket) -> tuple[bytes, list[int]]:
    """A `ForkRequest` as JSON with its descriptors, which are the caller's; b"" once the engine has gone."""
    data, fds, _, _ = socket.recv_fds(engine, MAX_REQUEST_BYTES, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
    return data, fds


def move_descriptors(fds: Sequence[int], numbers: Sequence[int]) -> None:
    """Give the open file of each of `fds` the descriptor of that number, whatever this was; `fds` are closed."""
    free = max(numbers, default=0) + 1
    parked = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, free) for fd in fds]
    for fd in fds:
        os.close(fd)
    for fd, number in zip(parked, numbers, strict=True):
        os.dup2(fd, number)
        os.close(fd)
