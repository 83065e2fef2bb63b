"""Real workers for tests: few, started once per session."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tetrion.engine.api import AsyncEngine
from tetrion.engine.config import EngineConfig


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep measurements of a machine busy with tests out of the user's cache."""
    import os

    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engine() -> AsyncIterator[AsyncEngine]:
    """Four one-thread workers with the embedded model."""
    async with AsyncEngine(EngineConfig(devices="cpu:4", num_threads=1)) as running:
        yield running
