"""A GPU worker that has its libraries loaded and waits to be told which one it is.

Importing them takes longer than loading the weights. GPU workers are not forked (a library that touches CUDA while it
is imported spoils it for every fork), so one process stands by in the place of the first that dies. It has no context
on any GPU yet, but may have its driver open: descriptors are used as they come, since what is under their old numbers
may be in use. It ends with the engine. `python -m tetrion.engine.worker.spare FD`: FD is its end of a socket.
"""

import signal
import socket
import sys

import msgspec

from tetrion.engine.models.registry import import_families
from tetrion.engine.worker.entry import run
from tetrion.engine.worker.handover import receive
from tetrion.engine.worker.spec import ForkRequest


def main() -> None:
    import tetrion.engine.worker.gpu
    import tetrion.engine.worker.runner  # noqa: F401

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import_families()
    with socket.socket(fileno=int(sys.argv[1])) as engine:
        data, fds = receive(engine)
    if not data:
        return
    request = msgspec.json.decode(data, type=ForkRequest)
    if len(fds) != len(request.fds):
        sys.exit(f"{len(fds)} of {len(request.fds)} descriptors came, no more were free")
    run(request.spec.renumbered(dict(zip(request.fds, fds, strict=True))))


if __name__ == "__main__":
    main()
