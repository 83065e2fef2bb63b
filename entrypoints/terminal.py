"""Standard streams of a console command: closed ones, and ones whose reader has gone."""

import os
import select
import sys
from collections.abc import Callable
from typing import Any

from tetrion.engine.hardware.standard_streams import hold_standard_descriptors

EXIT_BROKEN_PIPE = 141
"""What a shell reports of a program that SIGPIPE ended (128 + 13), as most do whose reader goes away."""


def hold_standard_streams() -> None:
    """What is closed from the start becomes /dev/null, so that nothing else gets its descriptor."""
    hold_standard_descriptors()
    for name, fd, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            stream = open(fd, mode, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115  for good
            setattr(sys, name, stream)


def say(line: str) -> None:
    """Tell people what goes on, on stderr; nobody need be there to read it."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _drop(2)


def is_reader_gone() -> bool:
    """Whether stdout or stderr is a pipe that nobody reads any more."""
    return any(_is_reader_gone(fd) for fd in (1, 2))


def flushed(run: Callable[[], int]) -> int:
    """The exit code of `run`, once all it has printed is written. 141 if the reader has gone away; raises OSError for a
    full disk."""
    try:
        code = run()
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        code = EXIT_BROKEN_PIPE
    except OSError:
        _drop(1)
        raise
    if code == EXIT_BROKEN_PIPE:
        for fd in (1, 2):
            if _is_reader_gone(fd):
                _drop(fd)
    return code


def _drop(fd: int) -> None:
    """What is still to be written to a stream that takes nothing, Python would write at its end, and complain."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, fd)
    os.close(null)


def _is_reader_gone(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0))


def progress_console() -> Any:
    """Of rich, on stderr. One that nobody reads any more is no reason to stop drawing."""
    from rich.console import Console

    class ProgressConsole(Console):
        def on_broken_pipe(self) -> None:
            self.quiet = True
            _drop(2)

    return ProgressConsole(stderr=True)
