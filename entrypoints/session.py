"""Opening an engine for one command: options to `EngineConfig`, the event loop, the first checks.

The only place under `entrypoints/` that names the engine class; tests hand in their own.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import msgspec

from tetrion.engine.config import EngineConfig
from tetrion.engine.event_loop import new_event_loop
from tetrion.entrypoints.errors import InputError

if TYPE_CHECKING:
    from tetrion.engine.api import AsyncEngine

EngineFactory = Callable[[EngineConfig], "AsyncEngine"]


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What every command that starts an engine accepts; None means the engine's default."""

    model: str | None = None
    devices: str | None = None
    num_threads: int | None = None
    policy: str | None = None


def engine_config(options: EngineOptions) -> EngineConfig:
    """The engine's config with the given options set, checked. Raises InputError naming field and bound."""
    given = {name: value for name, value in msgspec.structs.asdict(options).items() if value is not None}
    if "policy" in given:
        given["planner"] = {"policy": given.pop("policy")}
    try:
        return msgspec.convert(given, EngineConfig)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        raise InputError(f"{path.rstrip('`') or 'config'}: {message}") from None


def open_engine(options: EngineOptions, factory: EngineFactory | None = None) -> "AsyncEngine":
    """An engine that has checked its config and model folder but not started. Raises InputError, CheckpointError."""
    config = engine_config(options)
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
