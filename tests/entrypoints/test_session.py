"""What the commands share once their engine has started."""

import gc
import weakref

from tetrion.entrypoints.session import freeze_gc


class Node:
    """Refers to itself, so that only the garbage collector finds that nobody needs it."""

    def __init__(self) -> None:
        self.me = self


def test_garbage_goes_and_what_exists_is_not_looked_at_again() -> None:
    gone, kept = Node(), Node()
    is_gone, is_kept = weakref.ref(gone), weakref.ref(kept)
    del gone
    try:
        freeze_gc()
        assert is_gone() is None and gc.get_freeze_count() > 0
        del kept
        gc.collect()
        assert is_kept() is not None  # frozen: no later collection comes across it
        later = Node()
        is_later = weakref.ref(later)
        del later
        gc.collect()
        assert is_later() is None
    finally:
        gc.unfreeze()
    gc.collect()
    assert is_kept() is None
