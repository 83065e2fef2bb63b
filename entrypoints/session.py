"""Opening an engine for one command: options to `EngineConfig`, the event loop, the first checks.

The only place under `entrypoints/` that names the engine class; tests hand in their own.
"""

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import msgspec

from tetrion.engine.config import EngineConfig, PlannerConfig
from tetrion.engine.hardware.event_loop import new_event_loop
from tetrion.engine.planning.policies.registry import with_options
from tetrion.entrypoints.errors import InputError

if TYPE_CHECKING:
    from tetrion.engine.api import AsyncEngine

METERING = ("meter", "carbon")
EngineFactory = Callable[[EngineConfig], "AsyncEngine"]


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What every command that starts an engine accepts; None means the engine's default."""

    model: str | None = None
    devices: str | None = None
    load_format: str | None = None
    attention: str | None = None
    profile: str | None = None
    num_threads: int | None = None
    policy: str | None = None
    planner: tuple[str, ...] = ()
    """`KEY=VALUE` each: fields of `PlannerConfig` and options of its policy."""
    meter: str | None = None
    carbon: float | None = None


def engine_config(options: EngineOptions) -> EngineConfig:
    """The engine's config with the given options set, checked. Raises InputError naming field and bound."""
    given = {name: value for name, value in msgspec.structs.asdict(options).items() if value is not None}
    settings = dict(map(_planner_option, options.planner))
    common = settings.keys() & set(PlannerConfig.__struct_fields__)
    given["planner"] = {name: settings.pop(name) for name in common} | {"options": settings}
    if "policy" in given:
        given["planner"]["policy"] = given.pop("policy")
    given["metering"] = {name: given.pop(name) for name in METERING if name in given}
    try:
        config = msgspec.convert(given, EngineConfig)
        return msgspec.structs.replace(config, planner=with_options(config.planner))
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        raise InputError(f"{path.rstrip('`') or 'config'}: {message}") from None
    except ValueError as error:
        raise InputError(str(error)) from None


def _planner_option(text: str) -> tuple[str, Any]:
    """`rescue=false` as ("rescue", False): JSON where the value is JSON, else a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"planner: expected KEY=VALUE such as drop=fraction, got {text!r}")
    try:
        return name, msgspec.json.decode(value)
    except msgspec.DecodeError:
        return name, value


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


def freeze_gc() -> None:
    """Leave all objects that exist by now out of later garbage collections: a full one takes 15 to 30 ms, in which the
    loop stands still. For a process of our own, once its engine has started; a library must not do so to its host."""
    gc.collect()
    gc.freeze()
