"""For all tests: `benchmarks` can be imported, the user's cache is left alone, and without a GPU Triton interprets its
kernels, which it decides when it is imported: before all else."""

import os
import sys
import types
from pathlib import Path

import pytest

os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/dev/nvidiactl").exists() else "1")

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
