"""The descriptors 0, 1 and 2: what is opened while they are closed would get their numbers."""

import os


def hold_standard_descriptors() -> None:
    """Open /dev/null in place of those that are closed. A child is given its own in their place, libuv aborts when it
    closes one of them: no socket, pipe or shared memory must ever be one."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
