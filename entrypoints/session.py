"""Opening an engine for one command: the first checks, the event loop.

The only place under `entrypoints/` that names the engine class; tests hand in their own.
"""

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from tetrion.engine.config import EngineConfig
from tetrion.engine.hardware.event_loop import new_event_loop
from tetrion.entrypoints.errors import InputError

if TYPE_CHECKING:
    from tetrion.engine.api import AsyncEngine

EngineFactory = Callable[[EngineConfig], "AsyncEngine"]


def open_engine(config: EngineConfig, factory: EngineFactory | None = None) -> "AsyncEngine":
    """An engine that has checked its config and model folders but not started. Raises InputError, CheckpointError."""
    make = factory or _engine_class()
    try:
        return make(config)
    except ValueError as error:
        raise InputError(str(error)) from error


def _engine_class() -> "type[AsyncEngine]":
    from tetrion.engine import AsyncEngine

    return AsyncEngine


def run_async(main: Coroutine[Any, Any, int]) -> int:
    """Run `main` on uvloop where there is one. Ctrl-C cancels it, lets it clean up and raises KeyboardInterrupt."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)


def freeze_gc() -> None:
    """Leave all objects that exist by now out of later garbage collections: a full one takes 15 to 30 ms, in which the
    loop stands still. For a process of our own, once its engine has started; a library must not do so to its host."""
    gc.collect()
    gc.freeze()
