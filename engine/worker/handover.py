"""What a process is told that was started before it was known which worker it is to be."""

import socket

MAX_REQUEST_BYTES = 1 << 18
MAX_FDS = 253
"""What Linux lets one message carry."""


def receive(engine: socket.socket) -> tuple[bytes, list[int]]:
    """A `ForkRequest` as JSON with its descriptors, which are the caller's; b"" once the engine has gone."""
    data, fds, _, _ = socket.recv_fds(engine, MAX_REQUEST_BYTES, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
    return data, fds
