"""A small cost table and recorded simulated runs."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from tetrion.engine.planning.cost.profile import Profile
from tetrion.engine.planning.cost.tables import only_table
from tetrion.entrypoints.bench.recording import Recording
from tetrion.entrypoints.bench.simulation import Loss, SimulatedSystem
from tetrion.entrypoints.bench.slo_points import Grid
from tetrion.entrypoints.bench.slo_run import SloOptions, run

COST_TABLE = {
    "heads": 24,
    "classes": {
        "256x256": {"step_ms": {"1": 30.2, "2": 21.9, "4": 15.9}, "encode_ms": 25, "decode_ms": 15},
        "2048x2048": {"step_ms": {"1": 824.5, "2": 469.9, "4": 251.8}, "encode_ms": 25, "decode_ms": 480},
    },
}
PROFILE = msgspec.convert(COST_TABLE, Profile, strict=False)


@pytest.fixture
def profile_file(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(COST_TABLE))
    return path


@contextmanager
def small_disk(num_bytes: int = 500) -> Iterator[None]:
    """No file may become larger: a write fails in its midst, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def recorded(
    policies: tuple[str, ...] = ("horizon",), losses: tuple[Loss, ...] = (), **facts: float
) -> list[Recording]:
    """Simulated runs of 25 requests on 4 devices."""
    grid = Grid(rates_per_min=(24.0,), seeds=(3,), num_requests=25)
    system = SimulatedSystem(tables=only_table(PROFILE), num_devices=4, losses=losses, **facts)  # type: ignore[arg-type]
    return run(SloOptions(grid=grid, policies=policies, keep_chunks=True), system).recordings
