"""Real workers for tests: few, started once per session."""

from collections.abc import AsyncIterator

import pytest_asyncio

from tetrion.engine.api import AsyncEngine
from tetrion.engine.config import EngineConfig


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engine(fork_server: None) -> AsyncIterator[AsyncEngine]:
    """Four one-thread workers with the embedded model."""
    async with AsyncEngine(EngineConfig(devices="cpu:4", num_threads=1)) as running:
        yield running
