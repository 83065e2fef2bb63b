"""The engine: requests in, pictures out. `AsyncEngine` and `Engine` are its embedded forms."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tetrion.engine.api import AsyncEngine, RequestHandle
    from tetrion.engine.config import EngineConfig, PlannerConfig
    from tetrion.engine.errors import (
        DeadlineUnmeetable,
        EngineOverloaded,
        GenerationError,
        QueueTimeout,
        RequestCancelled,
        RequestError,
    )
    from tetrion.engine.model_spec import CheckpointError
    from tetrion.engine.request import EnergyOptions, ImageRequest, ImageResult, Progress
    from tetrion.engine.sync_engine import Engine

__all__ = [
    "AsyncEngine",
    "CheckpointError",
    "DeadlineUnmeetable",
    "EnergyOptions",
    "Engine",
    "EngineConfig",
    "EngineOverloaded",
    "GenerationError",
    "ImageRequest",
    "ImageResult",
    "PlannerConfig",
    "Progress",
    "QueueTimeout",
    "RequestCancelled",
    "RequestError",
    "RequestHandle",
]

_HOMES = {
    "api": ("AsyncEngine", "RequestHandle"),
    "sync_engine": ("Engine",),
    "config": ("EngineConfig", "PlannerConfig"),
    "errors": (
        "DeadlineUnmeetable",
        "EngineOverloaded",
        "GenerationError",
        "QueueTimeout",
        "RequestCancelled",
        "RequestError",
    ),
    "model_spec": ("CheckpointError",),
    "request": ("EnergyOptions", "ImageRequest", "ImageResult", "Progress"),
}


def __getattr__(name: str) -> Any:
    """Import a name's home on first use, so that importing one room does not import all of them."""
    import importlib

    if name == "__version__":
        from importlib.metadata import version

        return version("tetrion")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"tetrion.engine.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
