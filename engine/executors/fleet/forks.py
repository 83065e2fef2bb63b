"""What a process that is forked from the engine's own lets go of.

A fork inherits every descriptor. If it kept them, workers and their fork server would not see the engine end while it
lives, the engine's memory would not be given back, and the engine would not see a worker end whose life pipe was being
handed over just then. Python's own forks (`os.fork`, `multiprocessing`) go through here. What is started by `exec`
inherits nothing anyway.
"""

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Inherited(Protocol):
    def abandon(self) -> None:
        """In a forked child: close this process's copies, tell nobody, touch no event loop (its selector is the
        parent's, too)."""


class _Forks:
    def __init__(self) -> None:
        self.handing_over = threading.RLock()
        self.inherited: weakref.WeakSet[Inherited] = weakref.WeakSet()
        os.register_at_fork(
            before=lambda: self.handing_over.acquire(),
            after_in_parent=lambda: self.handing_over.release(),
            after_in_child=self._in_child,
        )

    def _in_child(self) -> None:
        inherited, self.inherited = list(self.inherited), weakref.WeakSet()
        self.handing_over = threading.RLock()
        for one in inherited:
            one.abandon()


_forks: _Forks | None = None
_first = threading.Lock()


def _get() -> _Forks:
    global _forks
    with _first:
        if _forks is None:
            _forks = _Forks()
        return _forks


def abandon_in_children(one: Inherited) -> None:
    """From now on, as long as it exists."""
    _get().inherited.add(one)


@contextmanager
def no_fork() -> Iterator[None]:
    """Meanwhile this process does not fork in another thread."""
    with _get().handing_over:
        yield
