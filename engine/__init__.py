"""The engine: requests in, pictures out. `AsyncEngine` and `Engine` are its embedded forms."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tetrion.engine.api import AsyncEngine
    from tetrion.engine.config import EngineConfig
    from tetrion.engine.request import EnergyOptions, ImageRequest, ImageResult
    from tetrion.engine.sync_engine import Engine

__all__ = ["AsyncEngine", "EnergyOptions", "Engine", "EngineConfig", "ImageRequest", "ImageResult"]

_HOMES = {
    "AsyncEngine": "tetrion.engine.api",
    "Engine": "tetrion.engine.sync_engine",
    "EnergyOptions": "tetrion.engine.request",
    "EngineConfig": "tetrion.engine.config",
    "ImageRequest": "tetrion.engine.request",
    "ImageResult": "tetrion.engine.request",
}


def __getattr__(name: str) -> Any:
    """Import a name's home on first use, so that importing one room does not import all of them."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
