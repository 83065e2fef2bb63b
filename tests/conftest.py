"""For all tests: `benchmarks` can be imported, the user's cache is left alone, and what libraries decide when they are
imported is set before all else: without a GPU Triton interprets its kernels, and products are as in a worker."""

import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from tetrion.engine.executors.fleet.reproducible import gemm_environment

os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/dev/nvidiactl").exists() else "1")
os.environ.update(gemm_environment())

# Nothing else of the root is to be importable: a `kernels` on the path would shadow another package.
if "benchmarks" not in sys.modules:
    package = types.ModuleType("benchmarks")
    package.__path__ = [str(Path(__file__).resolve().parents[1] / "benchmarks")]
    sys.modules["benchmarks"] = package


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep measurements of a machine busy with tests out of the user's cache; parallel test processes share theirs."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")


@pytest.fixture(scope="session")
def fork_server() -> Iterator[None]:
    """Engines of tests that use this start in half a second: the workers' libraries stay loaded between them."""
    from tetrion.engine.executors.fleet.forked import ForkServer

    server = ForkServer.acquire()
    yield
    server.release()


@pytest.fixture
def own_fork_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's engines share no fork server with those of other tests."""
    from tetrion.engine.executors.fleet.forked import ForkServer

    monkeypatch.setattr(ForkServer, "_shared", None)
