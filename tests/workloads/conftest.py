"""Makes `benchmarks` importable, and nothing else of the root: a `kernels` on the path would shadow another package."""

import sys
import types
from pathlib import Path

if "benchmarks" not in sys.modules:
    package = types.ModuleType("benchmarks")
    package.__path__ = [str(Path(__file__).resolve().parents[2] / "benchmarks")]
    sys.modules["benchmarks"] = package
